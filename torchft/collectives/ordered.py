"""The all-reduce whose bits follow from the members' names alone: ordered, and open to codecs.

A library's all-reduce adds in an order of its own, which changes with the number of members. Here:

    all-to-all     row r of every member goes to member r: a chunk of the elements
    sum            of the counted members' rows, one by one in rank order; the mean of them
    all-gather     every member gives its chunk to all

    3 members, 7 elements: chunks of 3, [a a a | b b b | c - -], the end padded with zeros

The ranks of a quorum are sorted replica ids. A member that is not counted sends as the others do
and sums its chunk, and its own row is left out: zeros would turn -0.0 into 0.0.

The second half is begun by whoever waits, or advances it before. So every member does that for its
averages in the order in which it began them. What travels are bytes, fewer with `QuantizedMean`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Work
from torch.distributed.distributed_c10d import AllgatherOptions
from torch.futures import Future

from torchft.errors import PhaseError
from torchft.ordered import chunk_of, ordered_mean
from torchft.process_group import ProcessGroup
from torchft.process_group.generation import Generation
from torchft.process_group.watchdog import wait_in_stream

__all__ = ["OrderedMean", "as_bytes"]


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 `[nbytes]`; shares storage where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class OrderedMean(Work):
    """The mean of the counted members' tensors, under way; `tensor` holds it when `wait` returns.

    Until then the tensor stays as it is. `wait` may be given too little time and called again.
    """

    def __init__(
        self,
        group: ProcessGroup,
        tensor: Tensor,
        counted: Sequence[int],
    ) -> None:
        super().__init__()
        self._group = group
        self._tensor = tensor
        self._counted = list(counted)
        self._generation: Generation | None = group.generation
        self._error: Exception | None = None
        self._done = tensor.numel() == 0
        self._chunks: Work | None = None
        self._means: Work | None = None
        if not self._done:
            self._send_chunks()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait, at most `timeout`, and do the second half.

        Raises:
            RuntimeError: it failed, was abandoned, or takes longer.
        """
        until = None if timeout is None else time.monotonic() + timeout.total_seconds()
        if not self._done:
            self.advance(timeout)
            self._wait_for(self._means, until)
            self._keep()
        return True

    def advance(self, timeout: timedelta | None = None) -> None:
        """Begin the second half, as soon as the first has arrived; `wait` has less to do then.

        Raises:
            RuntimeError: as `wait`.
        """
        until = None if timeout is None else time.monotonic() + timeout.total_seconds()
        if not self._done and self._means is None:
            self._wait_for(self._chunks, until)
            self._send_mean()

    def get_future(self) -> Future[list[Tensor]]:
        """Refuse: nothing completes by itself here.

        Raises:
            PhaseError: always.
        """
        raise PhaseError("an ordered mean has no future: its second half is done by who waits")

    def is_completed(self) -> bool:
        """Whether the tensor already holds the mean."""
        return self._done

    def synchronize(self) -> None:
        """Wait without a deadline, as `wait` does."""
        self.wait()

    def _send_chunks(self) -> None:
        members = self._group.size()
        chunk = chunk_of(self._tensor.numel(), members)
        rows = self._tensor.new_zeros(members, chunk)
        rows.view(-1)[: self._tensor.numel()] = self._tensor.detach().reshape(-1)
        self._sent = self._encode(rows)
        self._received = torch.empty_like(self._sent)
        self._chunks = self._group.alltoall_base(self._received, self._sent, [], [])

    def _send_mean(self) -> None:
        """Begun once: another start would not be matched by the other members."""
        if self._error is not None:
            raise self._error
        mine = self._encode_mean(self._mean(self._received))
        self._gathered = mine.new_empty(self._received.shape[0], mine.shape[1])
        try:
            self._means = self._same_members().allgather(
                [list(self._gathered.unbind())], [mine[0]], AllgatherOptions()
            )
        except Exception as error:
            self._error = error
            raise

    def _same_members(self) -> ProcessGroup | Generation:
        """Among whom it began: also after the group was made anew among others."""
        now = self._group.generation
        if self._generation is None or self._generation is now:
            return self._group
        return self._generation

    def _mean(self, received: Tensor) -> Tensor:
        """`[members, m]` bytes → `[1, chunk]`, the mean of those that are counted."""
        rows = self._decode(received)
        # Where nobody is counted, the step will be discarded.
        return ordered_mean(rows, self._counted) if self._counted else torch.zeros_like(rows[:1])

    def _encode_mean(self, mean: Tensor) -> Tensor:
        """`[1, chunk]` numbers → `[1, m]` bytes."""
        return self._encode(mean)

    def _encode(self, rows: Tensor) -> Tensor:
        """`[k, chunk]` numbers → `[k, m]` bytes, contiguous; here every bit travels."""
        return rows.view(torch.uint8)

    def _decode(self, wire: Tensor) -> Tensor:
        """`[k, m]` bytes → `[k, chunk]` numbers, which may share storage."""
        return wire.view(self._tensor.dtype)

    def _keep(self) -> None:
        means = self._decode(self._gathered).reshape(-1)
        self._tensor.detach().copy_(means[: self._tensor.numel()].view(self._tensor.shape))
        self._done = True

    @staticmethod
    def _wait_for(work: Work | None, until: float | None) -> None:
        assert work is not None
        left = None if until is None else max(0.001, until - time.monotonic())
        wait_in_stream(work, None if left is None else timedelta(seconds=left))
