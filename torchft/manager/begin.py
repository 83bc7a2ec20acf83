"""How a step begins: the quorum, and the process group of that quorum.

This runs beside the forward pass in async mode and on the training thread otherwise. `ask` returns
the plan of the step; `configure` sees that its members can communicate. Who heals is `heal.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import Store

from torchft.checkpointing import CheckpointTransport
from torchft.coordination import QuorumResult
from torchft.errors import CollectiveError, MeetingTimeoutError, TorchftError, UnreachableError
from torchft.ledger import Bucket
from torchft.manager.fingerprint import (
    Description,
    Fingerprint,
    exchange,
    same_world_sizes,
    withdraw,
)
from torchft.manager.plan import Plan, global_ranks, plan_step
from torchft.manager.starting_state import PUBLISHED, StartingState, announce, check
from torchft.peers import Place
from torchft.process_group import ProcessGroup, adapters
from torchft.process_group.adapters import Members
from torchft.process_group.attempt import Attempt, Deadline
from torchft.process_group.generation import Generation
from torchft.process_group.stores import StoreClients

if TYPE_CHECKING:
    from torchft.manager.group import ReplicaGroup
    from torchft.manager.progress import Progress
    from torchft.manager.step import Context, Step

__all__ = ["Beginner", "QuorumGroup", "Request", "prefix_of"]

_NAMED = 8
"""A list of members in an error stops after so many."""


@dataclass(frozen=True)
class Request:
    """What a rank asks for when it wants a quorum."""

    place: Place
    timeout: timedelta
    at: Progress
    """Where the rank stood when it asked: other steps may close until the quorum forms."""
    allow_heal: bool = True
    shrink_only: bool = False
    final_sync: bool = False
    """The rank ends its run: whoever is behind heals in this round, and nothing is averaged."""


class QuorumGroup:
    """The process group of one manager, and which quorum it was made for last."""

    def __init__(self, pg: ProcessGroup) -> None:
        self.pg = pg
        self.quorum_id: int | None = None
        """The quorum that it can be used in; None when it must be made anew."""
        self.broken = False
        """What was made last is of no use, though other groups may still have it."""
        self._configuring = False

    @property
    def generation(self) -> Generation | None:
        """The present generation, where the process group has generations."""
        return getattr(self.pg, "generation", None)  # torch's own groups have none

    @property
    def device(self) -> torch.device:
        """Where the process group wants tensors whose place does not matter."""
        return self.pg.device if isinstance(self.pg, ProcessGroup) else torch.device("cpu")

    @contextmanager
    def making(self, quorum_id: int) -> Iterator[None]:
        """Make it anew in here for this quorum; it stays broken where that raises."""
        self.quorum_id, self.broken, self._configuring = None, True, True
        try:
            yield
            self.quorum_id, self.broken = quorum_id, False
        finally:
            self._configuring = False

    def renew(self) -> None:
        """Have it made anew in the next quorum, if there is one."""
        if self.quorum_id is not None:
            self.quorum_id, self.broken = None, True

    def abandon(self, generation: Generation | None) -> None:
        """Free the peers that wait in this generation. If it is the present one, the next step
        makes another."""
        if generation is not None and generation is not self.generation:
            generation.retire("a step of it failed")
            return
        self.quorum_id, self.broken = None, True
        # Whoever is half way through meeting the others would leave them waiting for it there:
        # then `Beginner.configure` comes back to it.
        if not self._configuring:
            self.pg.abort()

    def error_of(self, generation: Generation | None) -> Exception | None:
        """Why this generation is of no use any more; None while it is."""
        if generation is None or generation is self.generation:
            return self.pg.errored()
        return generation.error


def prefix_of(plan: Plan, group_rank: int) -> str:
    """The store address at which the members of a quorum meet that have this group rank."""
    return f"{plan.store_address}/torchft/{plan.quorum_id}/{group_rank}"


class Beginner:
    """Begins one step after the other for one rank."""

    def __init__(
        self,
        context: Context,
        group: ReplicaGroup,
        transport: CheckpointTransport[Any],
        fingerprint: Fingerprint,
        starting_state: StartingState,
    ) -> None:
        self._context, self._options = context, context.options
        self._group = group
        self._transport = transport
        self._fingerprint = fingerprint
        self._starting = starting_state
        self.stores = StoreClients()
        self._patient = True

    def ask(self, step: Step, request: Request) -> Plan:
        """Wait for the quorum, and plan the step.

        Raises:
            UnreachableError: the lighthouse was away for the whole `lighthouse_timeout`.
            TimeoutError, QuorumError: the lighthouse's own answer.
            MismatchError: this group has another number of ranks than the others.
            CollectiveError: another group has.
        """
        with self._context.ledger.spending(Bucket.QUORUM):
            quorum = self._answer(request)
        plan = plan_step(
            quorum,
            self._options,
            place=request.place,
            configured=self._context.group.quorum_id,
            allow_heal=request.allow_heal,
        )
        step.known_plan = plan
        self._context.log.quorum(plan, request.at.step)
        step.decided.set()
        same_world_sizes(quorum.world_sizes, plan.members, plan.replica_rank, plan.reference)
        return plan

    def configure(self, step: Step, plan: Plan) -> None:
        """Make the process group of this quorum, unless it stands already.

        Raises:
            MismatchError: this group's model, settings or starting state differ from the others'.
            CollectiveError: it could not be made, or another group differs.
        """
        group = self._context.group
        if plan.reconfigure:
            with self._context.ledger.spending(Bucket.CONFIGURE), group.making(plan.quorum_id):
                self._configure(plan)
        step.generation = group.generation
        if step.generation is not None:
            step.generation.limit(self._options.timeout)
        if step.failed:  # meanwhile: no peer may wait for us in the new group
            group.abandon(step.generation)

    def stop_waiting(self) -> None:
        """The manager is shut down: a lighthouse that is away is not waited for any longer."""
        self._patient = False
        self.stores.close()

    def _answer(self, request: Request) -> QuorumResult:
        """The quorum. While the lighthouse is away, this group waits with all it has learnt."""
        patience = Deadline.after(self._options.lighthouse_timeout)
        while True:
            try:
                return self._answer_once(request)
            except UnreachableError as error:
                if request.final_sync or patience.passed() or not self._patient:
                    raise
                self._context.log.lighthouse_away(request.at.step, patience.left(), error)
                request = replace(request, timeout=min(request.timeout, patience.left()))

    def _answer_once(self, request: Request) -> QuorumResult:
        return self._group.client._quorum(
            group_rank=self._group.rank,
            step=request.at.step,
            checkpoint_metadata=self._transport.metadata(),
            shrink_only=request.shrink_only,
            init_sync=request.at.fresh,
            # Without a process group all must make a new one, even after a step that was committed.
            commit_failures=max(request.at.commit_failures, int(self._context.group.broken)),
            timeout=request.timeout,
            settling=request.final_sync,
        )

    def _configure(self, plan: Plan) -> None:
        prefix = prefix_of(plan, self._group.rank)
        state = self._starting.described(plan)  # here, where it may be read
        try:
            # A store whose process is stopped answers nothing and keeps no timeout of its own.
            deadline = Deadline.after(self._options.timeout)
            store = Attempt(lambda attempt: self._compare(attempt, plan, prefix, state)).wait(
                deadline
            )
            adapters.configure(self._context.group.pg, self._members(plan, prefix))
            self._starting.compared(plan)
            also = () if state is None else PUBLISHED
            Attempt(lambda _: withdraw(store, plan.replica_rank, also))  # nobody waits for it
        except (RuntimeError, OSError) as error:
            if isinstance(error, TorchftError) and not isinstance(error, MeetingTimeoutError):
                raise
            ranks = ", ".join(f"{rank} {name}" for rank, name in enumerate(plan.members[:_NAMED]))
            raise CollectiveError(
                f"the process group of quorum {plan.quorum_id} could not be made: {error} "
                f"(members by rank: {ranks})"
            ) from error

    def _members(self, plan: Plan, prefix: str) -> Members:
        """The members of the quorum that have this group rank, for its process group."""
        rank, ranks = self._group.rank, self._group.world_size
        return Members(
            prefix,
            self._group.name or "0",
            plan.replica_rank,
            len(plan.members),
            plan.quorum_id,
            rank,
            ranks,
            global_ranks(plan.members, rank, ranks),
        )

    def _compare(
        self, attempt: Attempt[Store], plan: Plan, prefix: str, state: Description | None
    ) -> Store:
        attempt.stage = f"all of {', '.join(plan.members)} to describe their models at {prefix}"
        store = self.stores.client(prefix, self._options.connect_timeout)
        if state is not None:
            announce(store, state, rank=plan.replica_rank, starts=self._starting.starts)
        exchange(
            store,
            self._fingerprint.whole(),
            rank=plan.replica_rank,
            members=plan.members,
            reference=plan.reference,
            timeout=self._options.timeout,
        )
        if state is not None:
            check(store, state, plan)
        self._fingerprint.was_compared()
        return store
