"""A process group that passes everything on: to another of ours, or to its generation of today.

Subclasses say how a generation is made (`_make`); this class swaps generations and never waits for
an old one. What is swapped out lives on for as long as somebody still communicates in it.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

from datetime import timedelta

from torch import Tensor
from torch.distributed import Work
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)

from torchft.process_group.account import Account
from torchft.process_group.attempt import Attempt, Deadline
from torchft.process_group.base import AnyAllreduceOptions, ProcessGroup
from torchft.process_group.generation import Generation
from torchft.process_group.rendezvous import Seat

__all__ = ["ProcessGroupWrapper"]


class ProcessGroupWrapper(ProcessGroup):
    """Passes on to `pg`, or without one to the generation that `configure` made.

    `timeout` is the deadline of each configure and each operation; with a `pg` it is that one's.
    """

    def __init__(
        self, timeout: timedelta = timedelta(seconds=60), pg: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self._timeout = timeout
        self._pg = pg
        self._generation: Generation | None = None
        self._sent = Account()
        self._attempt: Attempt[Generation] | None = None  # the configure that runs now

    # ------------------------------------------------------------------ members

    @property
    def parent(self) -> ProcessGroup | Generation:
        """The group or generation that operations go to.

        Raises:
            AssertionError: it was not configured yet.
        """
        parent = self._generation or self._pg
        if parent is None:
            raise AssertionError(f"{type(self).__name__}: call configure first")
        return parent

    @property
    def generation(self) -> Generation | None:
        """The members of today; None before the first configure and after shutdown."""
        if isinstance(self._pg, ProcessGroupWrapper):
            return self._pg.generation
        return self._generation

    @property
    def bytes_sent(self) -> int:
        """Payload handed to the wire, over all generations that were this group's latest."""
        if isinstance(self._pg, ProcessGroupWrapper):
            return self._pg.bytes_sent
        return self._sent.bytes_sent

    def configure(self, store_addr: str, replica_id: str, rank: int, world_size: int) -> None:
        """Make a new generation; the old one is let go before and never waited for."""
        if self._pg is not None:
            self._pg.configure(store_addr, replica_id, rank, world_size)
            return
        self._swap(None)
        deadline = Deadline.after(self._timeout)
        attempt = self._attempt = Attempt(
            lambda attempt: self._make(
                attempt, deadline, store_addr, Seat(rank, world_size, replica_id)
            ),
            discard=lambda late: late.retire("it stood after its deadline"),
        )
        try:
            generation = attempt.wait(deadline)
        finally:
            self._attempt = None
        self._swap(generation)
        if attempt.stopped.is_set():  # in the moment in which it stood
            generation.retire("aborted")

    def abort(self, errored: bool = True) -> None:
        """Abandon what is pending; with `errored`, `errored()` says so until the next configure."""
        if self._pg is not None:
            self._pg.abort()
            return
        if (attempt := self._attempt) is not None:
            attempt.stop()
        generation = self._generation
        if generation is not None:
            generation.retire("aborted")
        if not errored:
            self._swap(None)

    def shutdown(self) -> None:
        """Abandon what is pending and let go of everything."""
        if self._pg is not None:
            self._pg.shutdown()
            return
        self.abort(errored=False)

    def errored(self) -> Exception | None:
        """Why the present generation was abandoned."""
        if self._pg is not None:
            return self._pg.errored()
        generation = self._generation
        return generation.error if generation else None

    def set_timeout(self, timeout: timedelta) -> None:
        """Deadline of each configure and operation from now on."""
        self._timeout = timeout
        if self._pg is not None:
            self._pg.set_timeout(timeout)
        elif self._generation is not None:
            self._generation.set_timeout(timeout)

    def size(self) -> int:
        """How many members there are. AssertionError before the first configure."""
        return self.parent.size()

    def getBackendName(self) -> str:
        """That of the group it passes on to."""
        return self._pg.getBackendName() if self._pg is not None else super().getBackendName()

    def _make(
        self, attempt: Attempt[Generation], deadline: Deadline, store_addr: str, seat: Seat
    ) -> Generation:
        """A new generation, made on the attempt's thread."""
        raise self._lacks("configure")

    def _swap(self, generation: Generation | None) -> None:
        if generation is not None:
            generation.total = self._sent
        self._generation = generation

    # ------------------------------------------------------------------ operations

    def allreduce(self, tensors: list[Tensor], opts: AnyAllreduceOptions) -> Work:
        return (self._generation or self.parent).allreduce(tensors, opts)

    def allreduce_coalesced(
        self, tensors: list[Tensor], opts: AllreduceCoalescedOptions | None = None
    ) -> Work:
        return self.parent.allreduce_coalesced(tensors, opts or AllreduceCoalescedOptions())

    def allgather(
        self,
        output_tensors: list[list[Tensor]],
        input_tensor: list[Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        return self.parent.allgather(output_tensors, input_tensor, opts or AllgatherOptions())

    def allgather_into_tensor_coalesced(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        return self.parent.allgather_into_tensor_coalesced(
            output_tensors, input_tensors, opts or AllgatherOptions()
        )

    def alltoall_base(
        self,
        output_buffer: Tensor,
        input_buffer: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: AllToAllOptions | None = None,
    ) -> Work:
        return self.parent.alltoall_base(
            output_buffer,
            input_buffer,
            output_split_sizes,
            input_split_sizes,
            opts or AllToAllOptions(),
        )

    def barrier(self, opts: BarrierOptions | None = None) -> Work:
        return self.parent.barrier(opts)

    def broadcast(self, tensor_list: list[Tensor], opts: BroadcastOptions | None = None) -> Work:
        return self.parent.broadcast(tensor_list, opts or BroadcastOptions())

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> Work:
        return self.parent.send(tensors, dst_rank, tag)

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> Work:
        return self.parent.recv(tensors, src_rank, tag)

    def reduce_scatter(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[list[Tensor]],
        opts: ReduceScatterOptions | None = None,
    ) -> Work:
        return self.parent.reduce_scatter(
            output_tensors, input_tensors, opts or ReduceScatterOptions()
        )

    def reduce_scatter_tensor_coalesced(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        opts: ReduceScatterOptions | None = None,
    ) -> Work:
        return self.parent.reduce_scatter_tensor_coalesced(
            output_tensors, input_tensors, opts or ReduceScatterOptions()
        )
