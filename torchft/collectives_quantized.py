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

from collections.abc import Sequence

import torch
from torch import Tensor

from torchft.collectives import OrderedMean
from torchft.ordered import chunk_of
from torchft.process_group import ProcessGroup
from torchft.quantization import Codec, codec_of

__all__ = ["QuantizedMean"]


class QuantizedMean(OrderedMean):
    """The mean of the counted members' tensors, under way; `tensor` holds it when `wait` returns.

    It counts and fails as `OrderedMean` does, and like that one it is finished by who waits.
    """

    def __init__(
        self, group: ProcessGroup, tensor: Tensor, counted: Sequence[int], codec: str | Codec
    ) -> None:
        if not tensor.is_floating_point():
            raise ValueError(f"a quantised mean is of floating-point numbers, not {tensor.dtype}")
        self._numbers = codec_of(codec)
        self._chunk = chunk_of(tensor.numel(), group.size())
        super().__init__(group, tensor, counted, _OfChunks(self._numbers, self._chunk))

    def _mean(self, received: Tensor) -> Tensor:
        """The same sum, without all decoded rows in memory."""
        total = torch.zeros(1, self._chunk, device=received.device)
        if not self._counted:
            return total
        first, *others = self._counted
        self._numbers.decode(received[first : first + 1], self._chunk, out=total)
        for member in others:
            self._numbers.decode_add_(total, received[member : member + 1])
        return total.div_(len(self._counted))


class _OfChunks:
    """A codec for rows of one length. What it decodes to is fp32, whatever was encoded, since
    sums over members need the digits."""

    def __init__(self, codec: Codec, length: int) -> None:
        self._codec = codec
        self._length = length

    def encode(self, rows: Tensor) -> Tensor:
        """`[k, length]` → `[k, bytes]`."""
        return self._codec.encode(rows)

    def decode(self, wire: Tensor, dtype: torch.dtype) -> Tensor:
        """`[k, bytes]` → fp32 `[k, length]`."""
        return self._codec.decode(wire, self._length)
