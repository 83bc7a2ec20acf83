"""A process group that passes everything on: to another of ours, or to its generation of today.

A kind says how its backend is made (`_create_pg`); this class lets the members meet, swaps
generations and never waits for an old one. What is swapped out lives on for as long as somebody
still communicates in it.

For kinds outside of this package there are four hooks, with torchft's names and signatures:

    _create_pg(store, rank, world_size)   the backend of one quorum, on a thread of its own
    _opts_hook(opts)                      the options of an operation, before it starts
    _run_context()                        entered around the start of each operation
    _wrap_work(work, opts)                what its caller gets
"""
# mypy: disable-error-code="override"

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup as TorchProcessGroup
from torch.distributed import Store, Work

from torchft.errors import NotConfiguredError
from torchft.process_group import adapters, rendezvous
from torchft.process_group.account import Account
from torchft.process_group.adapters import Members
from torchft.process_group.attempt import Attempt, Deadline
from torchft.process_group.base import ProcessGroup
from torchft.process_group.control import Aborting, Control
from torchft.process_group.generation import Generation
from torchft.process_group.rendezvous import Member, Seat
from torchft.process_group.stores import StoreClients

__all__ = ["ProcessGroupWrapper"]

T = TypeVar("T")

_TORCH_LACKS = re.compile(r"Backend \S+ does not support ")
"""How torch says that a backend lacks an operation."""

_AS_IT_IS: AbstractContextManager[None] = nullcontext()


def _passed_on(name: str) -> Callable[..., Work]:
    """The operation `name`, passed on to the parent with the arguments as they are given."""
    declared = getattr(ProcessGroup, name)
    parameters = list(inspect.signature(declared).parameters)[1:]  # without self
    last = len(parameters) - 1 if parameters[-1] == "opts" else None

    @functools.wraps(declared)
    def operation(self: ProcessGroupWrapper, *args: Any, **named: Any) -> Work:
        opts = None
        if last is not None and len(args) > last:
            opts = self._opts_hook(args[last])
            args = (*args[:last], opts)
        elif "opts" in named:
            opts = named["opts"] = self._opts_hook(named["opts"])
        try:
            with self._run_context():
                work: Work = getattr(self.parent, name)(*args, **named)
        except RuntimeError as error:
            if _TORCH_LACKS.match(str(error)):
                raise self._lacks(name) from error
            raise
        return self._wrap_work(work, opts)

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
        self._stores = StoreClients()

    def __repr__(self) -> str:
        inside = "" if self._pg is None else f"pg={self._pg!r}"
        return f"{type(self).__name__}({inside})"

    # ------------------------------------------------------------------ members

    @property
    def parent(self) -> ProcessGroup | Generation:
        """The group or generation that operations go to.

        Raises:
            NotConfiguredError: it was not configured yet, or was shut down.
        """
        parent = self._generation or self._pg
        if parent is None:
            raise NotConfiguredError(
                f"{type(self).__name__} has no members yet: call configure first, or give it to a "
                "Manager, which configures it in each new quorum"
            )
        return parent

    @property
    def device(self) -> torch.device:
        """That of the group inside, or the CPU."""
        return super().device if self._pg is None else self._pg.device

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

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        group_rank: int | None = None,
        group_world_size: int | None = None,
        global_ranks: list[int] | None = None,
    ) -> None:
        """Make a new generation; the old one is let go before and never waited for."""
        if self._pg is not None:
            more = (quorum_id, group_rank, group_world_size, global_ranks)
            members = Members(store_addr, replica_id, rank, world_size, *more)
            adapters.configure(self._pg, members)
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
        self._stores.close()

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
        """How many members there are; NotConfiguredError before the first configure."""
        return self.parent.size()

    def getBackendName(self) -> str:
        """That of the group it passes on to."""
        return self._pg.getBackendName() if self._pg is not None else super().getBackendName()

    # ------------------------------------------------------------------ hooks of a kind

    def _create_pg(self, store: Store, rank: int, world_size: int) -> TorchProcessGroup:
        """The backend among members that have met at `store`, which is theirs alone."""
        raise self._lacks("configure: it has no _create_pg")

    def _opts_hook(self, opts: T) -> T:
        """What an operation is started with in place of `opts`, which may be a bare ReduceOp."""
        return opts

    def _run_context(self) -> AbstractContextManager[None]:
        """What is entered around the start of each operation."""
        return _AS_IT_IS

    def _wrap_work(self, work: Work, opts: object) -> Work:
        """What the caller of an operation gets in place of `work`."""
        return work

    def _control(self) -> Control:
        """How the backend of `_create_pg` is ended and watched."""
        return Aborting(self.device)

    def _member(self, seat: Seat) -> Member:
        """What this member tells the others of itself."""
        return Member.here(seat, None)

    def _make(
        self, attempt: Attempt[Generation], deadline: Deadline, store_addr: str, seat: Seat
    ) -> Generation:
        """A new generation, made on the attempt's thread."""
        attempt.stage = f"the store at {store_addr}"
        store = self._stores.client(store_addr, self._timeout)
        members = rendezvous.meet(
            store, self._member(seat), store_addr, deadline, attempt.stopped.is_set
        )
        attempt.stage = f"{type(self).__name__} to connect its {seat.world_size} members"
        backend = self._create_pg(store, seat.rank, seat.world_size)
        return Generation(
            backend,
            name=store_addr,
            rank=seat.rank,
            members=members,
            store=store,
            control=self._control(),
            timeout=self._timeout,
        )

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
