"""The ordered all-reduce over encoded chunks: fewer bytes, equal bits at all members.

    encode       each member its chunks, one for every member
    all-to-all   of the bytes
    mean         decode the counted members' chunks, sum them in fp32 in rank order, divide
    all-gather   of the mean, encoded again
    decode       all members the same bytes

`torchft.quantization.quantized_mean` says the same in one process. All members must use one codec:
its bytes say nothing of what made them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import ReduceOp, Work
from torch.distributed.distributed_c10d import AllreduceOptions
from torch.futures import Future

from torchft.collectives.ordered import OrderedMean
from torchft.errors import PhaseError, SettingsError
from torchft.ordered import chunk_of
from torchft.process_group import ProcessGroup
from torchft.quantization import Codec, codec_for, codec_of, default_codec
from torchft.quantization.codec import into
from torchft.quantization.mean import add_lost, take_said

__all__ = ["QuantizedMean", "adds", "allreduce_quantized", "codec_for"]


class QuantizedMean(OrderedMean):
    """The mean of the counted members' tensors, under way; `tensor` holds it when `wait` returns.

    It counts and fails as `OrderedMean` does, and like that one it is finished by who waits. With
    `summed` it is their sum: the mean times their number.

    `error_feedback`, contiguous fp32 or fp64 of as many elements. In: the exact values of this
    member's tensor. Out: the quantisation error, as `quantized_mean` has it, written before it is
    known whether the mean counts.

    Raises:
        SettingsError: the codec cannot hold the tensor's dtype, or there is no such codec.
    """

    def __init__(
        self,
        group: ProcessGroup,
        tensor: Tensor,
        counted: Sequence[int],
        codec: str | Codec,
        *,
        summed: bool = False,
        error_feedback: Tensor | None = None,
    ) -> None:
        self._codec = codec_of(codec)
        self._codec.check(tensor.dtype)
        self._error_feedback = error_feedback
        self._chunk = chunk_of(tensor.numel(), group.size())
        self._summed = summed
        super().__init__(group, tensor, counted)

    def _send_chunks(self) -> None:
        super()._send_chunks()
        if self._error_feedback is not None:
            for member in range(self._sent.shape[0]):  # one by one: all of it is a second tensor
                said = self._codec.decode(self._sent[member : member + 1], self._chunk)
                take_said(self._error_feedback, said, first=member)

    def _encode(self, rows: Tensor) -> Tensor:
        return self._codec.encode(rows)

    def _decode(self, wire: Tensor) -> Tensor:
        """fp32, whatever was encoded, since sums over members need the digits."""
        return self._codec.decode(wire, self._chunk)

    def _encode_mean(self, mean: Tensor) -> Tensor:
        encoded = super()._encode_mean(mean)
        if self._error_feedback is not None:
            sent = self._codec.decode(encoded, self._chunk)
            add_lost(self._error_feedback, self._own_rank(), mean, sent, len(self._counted))
        return encoded

    def _own_rank(self) -> int:
        return self._group.rank() if self._generation is None else self._generation.rank

    def _mean(self, received: Tensor) -> Tensor:
        """The same sum, without all decoded rows in memory."""
        total = torch.zeros(1, self._chunk, dtype=torch.float32, device=received.device)
        if not self._counted:
            return total
        first, *others = self._counted
        into(total, self._codec.decode(received[first : first + 1], self._chunk, out=total))
        for member in others:
            self._codec.decode_add_(total, received[member : member + 1])
        return total.div_(len(self._counted))

    def _keep(self) -> None:
        super()._keep()
        if self._summed:
            self._tensor.detach().mul_(len(self._counted))


def adds(op: ReduceOp | ReduceOp.RedOpType) -> bool:
    """Whether `op` is SUM; it is AVG otherwise.

    Raises:
        NotImplementedError: it is neither.
    """
    summed, averaged = op == ReduceOp.SUM, op == ReduceOp.AVG
    if not (summed or averaged):
        raise NotImplementedError("a quantised all-reduce sums or averages: give SUM or AVG")
    return bool(summed)


def allreduce_quantized(
    tensors: Sequence[Tensor],
    opts: AllreduceOptions | ReduceOp | ReduceOp.RedOpType,
    pg: ProcessGroup,
    sync_stream: torch.Stream | None = None,
    *,
    codec: str | Codec | None = None,
) -> Work:
    """Sum or average all members' tensors, in place; finished by who waits, in order.

    Args:
        codec: the same at all members; by default what `default_codec` says of each tensor's
            device.

    Raises:
        NotImplementedError: neither SUM nor AVG.
        SettingsError: a `sync_stream`; the current stream is used.
    """
    op = opts.reduceOp if isinstance(opts, AllreduceOptions) else opts
    summed = adds(op)
    if sync_stream is not None:
        raise SettingsError("sync_stream is not used here: wait in the stream that you want")
    members = range(pg.size())
    codecs = [codec or default_codec(tensor.device) for tensor in tensors]
    for tensor, by in zip(tensors, codecs, strict=True):
        codec_of(by).check(tensor.dtype)
    return _Several(
        [
            QuantizedMean(pg, one, members, by, summed=summed)
            for one, by in zip(tensors, codecs, strict=True)
        ]
    )


class _Several(Work):
    """Means or sums under way."""

    def __init__(self, means: list[QuantizedMean]) -> None:
        super().__init__()
        self._means = means

    def wait(self, timeout: timedelta | None = None) -> bool:
        """All of them, in order. May be given too little time and called again."""
        until = None if timeout is None else time.monotonic() + timeout.total_seconds()
        while self._means:
            left = None if until is None else max(0.001, until - time.monotonic())
            self._means[0].wait(None if left is None else timedelta(seconds=left))
            self._means.pop(0)
        return True

    def get_future(self) -> Future[list[Tensor]]:
        """PhaseError: nothing completes by itself here."""
        raise PhaseError("a quantised all-reduce has no future: who waits does its second half")

    def is_completed(self) -> bool:
        """Whether all results are there."""
        return not self._means

    def synchronize(self) -> None:
        """The same as `wait`."""
        self.wait()
