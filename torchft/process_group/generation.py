"""A process group that never changes: made for one quorum, used, retired.

Whoever communicates holds the generation that it began with: a newer one does not end it. Two
things do. `retire` abandons it: pending operations end with an error at once, with gloo at every
peer too, and further ones are refused (`control.py` says how). And a generation that nobody holds
any more is retired likewise. In both cases the reaper gets the group itself, so that its end, which
may have to wait for work, never happens on the thread that trains.

What a device runs by itself is watched (`watchdog.py`): one operation that does not end by its
deadline retires the generation.

Each generation counts the bytes that its operations hand to the wire, by gloo's algorithms: a ring
for all-reduce (2(n-1)/n of the tensor from each of n members) and all-gather (n-1 times one's own),
pairwise all-to-all. A broadcast is counted once, n-1 times at its root. Headers are not counted.
"""
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup as TorchProcessGroup
from torch.distributed import ReduceOp, Store, Work
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)

from torchft.errors import CollectiveError, IntegerAverageError, UnsupportedError
from torchft.process_group import reaper
from torchft.process_group.account import Account, payer
from torchft.process_group.control import Control
from torchft.process_group.rendezvous import Member
from torchft.process_group.watchdog import DeviceWork, Watchdog
from torchft.work import AllOf

__all__ = ["Generation"]

_living: weakref.WeakSet[Generation] = weakref.WeakSet()


def _with_op(op: ReduceOp.RedOpType) -> AllreduceOptions:
    opts = AllreduceOptions()
    opts.reduceOp = op
    return opts


_options: dict[object, AllreduceOptions] = {
    op: _with_op(op)
    for name, op in ReduceOp.RedOpType.__members__.items()
    if name != "PREMUL_SUM"  # needs a factor too
}
"""Torch takes a bare operation too, and 6 µs longer to find out that it is one."""


class Generation:
    """One backend among fixed members. Made by a process group's `configure`."""

    def __init__(
        self,
        backend: Any,
        *,
        name: str,
        rank: int,
        members: Sequence[Member],
        store: Store,
        control: Control,
        timeout: timedelta,
    ) -> None:
        self.name = name
        """The store address it was made at: unique among all generations."""
        self.rank = rank
        self.members = tuple(members)
        """In the order of their ranks."""
        self.store: Store | None = store
        """Where its members met. Served by one of them, so it ends with that one. None: retired."""
        self.account = Account()
        self.total: Account | None = None
        """That of all generations of one process group."""
        self._error: CollectiveError | None = None
        self._size = len(self.members)
        self._backend = backend
        self._control = control
        self._timeout = self._limit = timeout
        self._watchdog = Watchdog(self.retire) if control.on_device else None
        self._release = weakref.finalize(self, _release, [backend], control, os.getpid())
        self._release.atexit = False  # _retire_all does it, in time for the reaper's end
        _living.add(self)

    def retire(self, reason: str) -> None:
        """Abandon it. Pending operations end with an error; never blocks; a second call is idle."""
        if self._error is None:
            self._error = CollectiveError(f"process group {self.name} was abandoned: {reason}")
            self._backend = _Gone(self._error)
            self.store = None
            self._release()

    @property
    def error(self) -> CollectiveError | None:
        """Why it was retired, or what its backend says has gone wrong; None while it works."""
        if self._error is None and (failure := self._control.failure(self._backend)) is not None:
            self.retire(f"its backend reports {failure}: most often a member of it has died")
        return self._error

    @property
    def retired(self) -> bool:
        """Whether it was retired, so that new operations are refused."""
        return self._error is not None

    @property
    def lost(self) -> bool:
        """Whether a member is known to be gone: no further operation of all can succeed."""
        return self.retired or self._control.lost(self._backend)

    def size(self) -> int:
        """How many members the generation was made for."""
        return self._size

    def set_timeout(self, timeout: timedelta) -> None:
        """Deadline of each operation from now on; with torch 2.7, from the next generation on."""
        self._timeout = self._limit = timeout
        if self._error is None:
            set_backend_timeout(self._backend, timeout)

    def limit(self, timeout: timedelta) -> None:
        """Let no operation that a device runs take longer than `timeout`, whatever the process
        group's own is. Whoever waits for another one has a deadline of its own."""
        self._limit = min(self._timeout, timeout)

    # Operations. Each returns torch's own Work, whose `wait(timeout)` raises RuntimeError when the
    # operation failed or was abandoned; CollectiveError when this generation is retired already.

    def allreduce(
        self, tensors: list[Tensor], opts: AllreduceOptions | ReduceOp | ReduceOp.RedOpType
    ) -> Work:
        """Reduce in place; `tensors` holds one tensor."""
        opts = _options.get(opts) or opts
        _check_average(tensors, opts)
        work = self._backend.allreduce(tensors, opts)
        # After the start: this much is hidden behind the communication.
        self._count(tensors[0].nbytes * 2 * (self._size - 1) // self._size)
        return self._begun(work, tensors)

    def allreduce_coalesced(
        self, tensors: list[Tensor], opts: AllreduceCoalescedOptions | None = None
    ) -> Work:
        """Reduce several tensors of one dtype in place, as one operation."""
        opts = opts or AllreduceCoalescedOptions()
        _check_average(tensors, opts)
        work = self._backend.allreduce_coalesced(tensors, opts)
        self._count(_bytes(tensors) * 2 * (self._size - 1) // self._size)
        return self._begun(work, tensors)

    def allgather(
        self,
        output_tensors: list[list[Tensor]],
        input_tensor: list[Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        """`[x]` of each member → `[[x of rank 0, x of rank 1, …]]` at every one."""
        work = self._backend.allgather(output_tensors, input_tensor, opts or AllgatherOptions())
        self._count(_bytes(input_tensor) * (self._size - 1))
        return self._begun(work, input_tensor)

    def allgather_into_tensor_coalesced(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        """Each `[k, …]` of every member → one `[n * k, …]`."""
        opts = opts or AllgatherOptions()
        if isinstance(self._backend, TorchProcessGroup):
            work = self._backend.allgather_into_tensor_coalesced(
                output_tensors, input_tensors, opts
            )
        else:
            # Gloo's backend has no such operation; it has one with a tensor for each member.
            parts = [output.tensor_split(self._size) for output in output_tensors]
            by_rank = [list(of_one) for of_one in zip(*parts, strict=True)]
            work = self._backend.allgather_coalesced(by_rank, input_tensors, opts)
        self._count(_bytes(input_tensors) * (self._size - 1))
        return self._begun(work, input_tensors)

    def alltoall_base(
        self,
        output_buffer: Tensor,
        input_buffer: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: AllToAllOptions | None = None,
    ) -> Work:
        """Row block i of `input_buffer` goes to rank i. Empty split sizes: equal blocks."""
        work = self._backend.alltoall_base(
            output_buffer,
            input_buffer,
            output_split_sizes,
            input_split_sizes,
            opts or AllToAllOptions(),
        )
        self._count(_leaving(input_buffer, input_split_sizes, self.rank, self._size))
        return self._begun(work, [input_buffer])

    def barrier(self, opts: BarrierOptions | None = None) -> Work:
        """Ends when every member has called it."""
        return self._backend.barrier(opts or BarrierOptions())

    def broadcast(self, tensor_list: list[Tensor], opts: BroadcastOptions | None = None) -> Work:
        """The tensor of `opts.rootRank` (default 0) to all, in place."""
        opts = opts or BroadcastOptions()
        work = self._backend.broadcast(tensor_list, opts)
        if opts.rootRank == self.rank:
            self._count(_bytes(tensor_list) * (self._size - 1))
        return self._begun(work, tensor_list)

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> Work:
        """One tensor to `dst_rank`, which receives it under the same tag."""
        work = self._backend.send(tensors, dst_rank, tag)
        self._count(_bytes(tensors))
        return self._begun(work, tensors)

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> Work:
        """One tensor from `src_rank`, into the one given."""
        return self._begun(self._backend.recv(tensors, src_rank, tag), tensors)

    def reduce_scatter(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[list[Tensor]],
        opts: ReduceScatterOptions | None = None,
    ) -> Work:
        """Reduce `[[x0, x1, …]]` and keep the one of one's own rank. With gloo all of one shape."""
        opts = opts or ReduceScatterOptions()
        _check_average(output_tensors, opts)
        if isinstance(self._backend, TorchProcessGroup):
            work = self._backend.reduce_scatter(output_tensors, input_tensors, opts)
        else:
            # Gloo's backend has it for one tensor only in some releases of torch.
            rows = [_stacked(row) for row in input_tensors]
            outputs = [one.unsqueeze(0) for one in output_tensors]
            work = self._reduce_scatter_each(outputs, rows, opts)
        self._count(_bytes(output_tensors) * (self._size - 1))
        return self._begun(work, output_tensors)

    def reduce_scatter_tensor_coalesced(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        opts: ReduceScatterOptions | None = None,
    ) -> Work:
        """Reduce each `[n * k, …]` and keep one's own `[k, …]`."""
        opts = opts or ReduceScatterOptions()
        _check_average(output_tensors, opts)
        if isinstance(self._backend, TorchProcessGroup):
            work = self._backend.reduce_scatter_tensor_coalesced(
                output_tensors, input_tensors, opts
            )
        else:
            work = self._reduce_scatter_each(output_tensors, input_tensors, opts)
        self._count(_bytes(output_tensors) * (self._size - 1))
        return self._begun(work, output_tensors)

    def _reduce_scatter_each(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: ReduceScatterOptions
    ) -> Work:
        return AllOf(
            [
                self._backend._reduce_scatter_base(output, given, opts)
                for output, given in zip(outputs, inputs, strict=True)
            ]
        )

    def _begun(self, work: Work, tensors: Sequence[Tensor]) -> Work:
        """The work for who asked for it: watched, where a device runs it."""
        if self._watchdog is None or all(one.device.type == "cpu" for one in tensors):
            return work
        self._watchdog.watch(work, self._limit)
        return DeviceWork(work, lambda: self.error)

    @property
    def bytes_sent(self) -> int:
        """Payload that this member has handed to the wire."""
        return self.account.bytes_sent

    def _count(self, sent: int) -> None:
        for account in (self.account, self.total, payer()):
            if account is not None:
                account.add(sent)


class _Gone:
    """Stands in for the backend of a retired generation: whatever is asked of it is refused."""

    def __init__(self, error: CollectiveError) -> None:
        self._error = error

    def __getattr__(self, operation: str) -> NoReturn:
        raise CollectiveError(f"{operation}: {self._error}")


def set_backend_timeout(backend: Any, timeout: timedelta) -> None:
    """Where torch lets it be changed; elsewhere (2.7) a backend keeps the one it was made with."""
    if hasattr(backend, "set_timeout"):
        backend.set_timeout(timeout)


_WITH_OP = (AllreduceOptions, AllreduceCoalescedOptions, ReduceScatterOptions)


def _check_average(tensors: Sequence[Tensor], opts: Any) -> None:
    """Refuse an average of integers, which no backend computes alike.

    Raises:
        IntegerAverageError: that is what is asked for.
    """
    op = opts.reduceOp if isinstance(opts, _WITH_OP) else opts  # torch takes a bare one too
    if op == ReduceOp.AVG and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
        raise IntegerAverageError(
            f"AVG of {tensors[0].dtype}: an average needs floating-point or complex tensors: use "
            "SUM and divide, or convert the tensor before"
        )


def _stacked(row: list[Tensor]) -> Tensor:
    if len({one.shape for one in row}) > 1:
        raise UnsupportedError(
            "gloo does not support reduce_scatter of tensors of different shapes: pad them to one "
            "shape, or use allreduce and keep your part"
        )
    return torch.stack(row)


def _release(backend: list[object], control: Control, pid: int) -> None:
    if os.getpid() != pid:
        # A forked child shares the connections with its parent, which still uses them.
        reaper.leak(backend.pop())
        return
    control.end(backend[0])
    reaper.bury(backend)


@atexit.register
def _retire_all() -> None:
    for generation in list(_living):
        generation.retire("the process ends")


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _leaving(buffer: Tensor, splits: Sequence[int], rank: int, size: int) -> int:
    """Bytes of an all-to-all's input that are not for oneself."""
    if not splits:
        return buffer.nbytes * (size - 1) // size
    total = sum(splits)
    return buffer.nbytes * (total - splits[rank]) // total if total else 0
