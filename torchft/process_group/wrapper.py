"""A process group that passes everything on: to another of ours, or to its generation of today.

Subclasses say how a generation is made (`_make`); this class swaps generations and never waits for
an old one. What is swapped out lives on for as long as somebody still communicates in it.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import Work

from torchft.process_group.account import Account
from torchft.process_group.attempt import Attempt, Deadline
from torchft.process_group.base import ProcessGroup
from torchft.process_group.generation import Generation
from torchft.process_group.rendezvous import Seat

__all__ = ["ProcessGroupWrapper"]


def _passed_on(name: str) -> Callable[..., Work]:
    """The operation `name`, passed on to the parent with the arguments as they are given."""

    @functools.wraps(getattr(ProcessGroup, name))
    def operation(self: ProcessGroupWrapper, *args: Any, **options: Any) -> Work:
        work: Work = getattr(self.parent, name)(*args, **options)
        return work

    return operation


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

    allreduce = _passed_on("allreduce")
    allreduce_coalesced = _passed_on("allreduce_coalesced")
    allgather = _passed_on("allgather")
    allgather_into_tensor_coalesced = _passed_on("allgather_into_tensor_coalesced")
    alltoall_base = _passed_on("alltoall_base")
    barrier = _passed_on("barrier")
    broadcast = _passed_on("broadcast")
    send = _passed_on("send")
    recv = _passed_on("recv")
    reduce_scatter = _passed_on("reduce_scatter")
    reduce_scatter_tensor_coalesced = _passed_on("reduce_scatter_tensor_coalesced")
