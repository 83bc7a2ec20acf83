"""How a step forms: the quorum, the process group of that quorum, and who heals from whom.

This runs beside the forward pass in async mode and on the training thread otherwise. It loads
nothing: a fetched state is staged in the transaction, for the training thread to load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

from torch.distributed import Store

from torchft.checkpointing import CheckpointTransport
from torchft.coordination import QuorumResult
from torchft.errors import CollectiveError, HealError, StepError, TorchftError, UnreachableError
from torchft.ledger import Bucket, Ledger
from torchft.manager import heal as healing
from torchft.manager.fingerprint import Description, exchange, same_world_sizes, withdraw
from torchft.manager.group import ReplicaGroup
from torchft.manager.heal_progress import Patience, report_progress, wait_for_heals
from torchft.manager.plan import Donor, Options, Plan, plan_step
from torchft.manager.telemetry import StepLog
from torchft.manager.transaction import Transaction
from torchft.peers import Place
from torchft.process_group import ProcessGroup
from torchft.process_group.attempt import Attempt, Deadline
from torchft.process_group.generation import Generation
from torchft.process_group.stores import StoreClients

__all__ = ["Former", "Request"]

_NAMED = 8
"""A list of members in an error stops after so many."""


@dataclass(frozen=True)
class Request:
    """What a rank says when it asks for a quorum."""

    place: Place
    step: int
    fresh: bool
    """Not in a quorum yet, and wants the initial synchronisation."""
    commit_failures: int
    allow_heal: bool
    shrink_only: bool
    settling: bool
    timeout: timedelta


class Former:
    """Forms one step after the other for one rank."""

    def __init__(
        self,
        *,
        group: ReplicaGroup,
        pg: ProcessGroup,
        transport: CheckpointTransport[Any],
        options: Options,
        ledger: Ledger,
        log: StepLog,
        collect_state: Callable[[], Any],
    ) -> None:
        self.description: Description = {}
        """What is compared with the other groups beside the settings: the models, by key."""
        self._listeners: Description = {}
        self._once: Description = {}
        self._group = group
        self._pg = pg
        self._transport = transport
        self._options = options
        self._ledger = ledger
        self._log = log
        self._collect_state = collect_state
        self._stores = StoreClients()
        self._patience = Patience(
            options.timeout.total_seconds(), options.heal_limit.total_seconds()
        )
        self._configured: int | None = None
        self._configuring = False
        self._patient = True
        self._broken = False
        """The process group that was made last is of no use, though others may still have it."""
        self._offering: Transaction | None = None
        """The step for which the state is offered now."""

    def form(
        self, transaction: Transaction, request: Request, before_heals: Callable[[Plan], None]
    ) -> None:
        """Fill `transaction.plan`. Never raises: what kept the quorum from forming is
        `transaction.failure`, what spoilt the step is its error.

        `before_heals` is called when the members can communicate, before state moves among them.
        """
        try:
            with self._ledger.spending(Bucket.QUORUM):
                quorum = self._ask(request)
            transaction.plan = plan = plan_step(
                quorum,
                self._options,
                place=request.place,
                configured=self._configured,
                allow_heal=request.allow_heal,
            )
            self._log.quorum(plan, request.step)
            transaction.decided.set()
            same_world_sizes(quorum.world_sizes, plan.members, plan.replica_rank, plan.reference)
            if plan.reconfigure:
                with self._ledger.spending(Bucket.CONFIGURE):
                    self._configure_whole(plan)
            transaction.generation = getattr(self._pg, "generation", None)
            transaction.group_error = partial(self._group_error, transaction.generation)
            if transaction.failed:  # meanwhile: no peer may wait for us in the new group
                self.abandon(transaction)
            transaction.offered_before = self.bytes_offered()
            transaction.configured.set()
            before_heals(plan)
            with self._ledger.spending(Bucket.HEAL):
                self._exchange_state(transaction, plan)
        except StepError as error:
            transaction.report(error)
        except BaseException as error:
            transaction.failure = error
        finally:
            transaction.finish_forming()

    def compare(self, always: Description, once: Description) -> None:
        """Compare what the step listeners describe, the next time that a process group is made:
        when it has changed, or there is something to compare `once`, that is in the next step."""
        anew = bool(once) or always != self._listeners
        self._listeners, self._once = always, self._once | once
        if anew and self._configured is not None:
            self._configured, self._broken = None, True

    def abandon(self, transaction: Transaction) -> None:
        """Free the peers that wait in this step's process group. If that is today's, the next step
        makes another."""
        generation = transaction.generation
        if generation is not None and generation is not getattr(self._pg, "generation", None):
            generation.retire("a step of it failed")
            return
        self._configured = None
        self._broken = True
        # Whoever is half way through meeting the others would leave them waiting for it there:
        # then `form` comes back to it.
        if not self._configuring:
            self._pg.abort()

    def bytes_offered(self) -> int:
        """Bytes of state sent so far."""
        return getattr(self._transport, "bytes_sent", 0)

    def withdraw(self, transaction: Transaction) -> None:
        """The step is over: the state that was offered in it may change."""
        if self._offering is transaction:
            self._offering = None
            self._transport.disallow_checkpoint()

    def _group_error(self, generation: Generation | None) -> Exception | None:
        if generation is None or generation is getattr(self._pg, "generation", None):
            return self._pg.errored()
        return generation.error

    def stop_waiting(self) -> None:
        """The manager is shut down: a lighthouse that is away is not waited for any longer."""
        self._patient = False
        self._stores.close()

    def _ask(self, request: Request) -> QuorumResult:
        """The quorum. While the lighthouse is away, this group waits with all that it has learnt.

        Raises:
            UnreachableError: it was away for the whole `lighthouse_timeout`.
            TimeoutError, QuorumError: the lighthouse's own answer.
        """
        patience = Deadline.after(self._options.lighthouse_timeout)
        while True:
            try:
                return self._ask_once(request)
            except UnreachableError as error:
                if request.settling or patience.passed() or not self._patient:
                    raise
                self._log.lighthouse_away(request.step, patience.left(), error)
                request = replace(request, timeout=min(request.timeout, patience.left()))

    def _ask_once(self, request: Request) -> QuorumResult:
        return self._group.client._quorum(
            group_rank=self._group.rank,
            step=request.step,
            checkpoint_metadata=self._transport.metadata(),
            shrink_only=request.shrink_only,
            init_sync=request.fresh,
            # Without a process group all must make a new one, even after a step that was committed.
            commit_failures=max(request.commit_failures, int(self._broken)),
            timeout=request.timeout,
            settling=request.settling,
        )

    def _configure_whole(self, plan: Plan) -> None:
        self._configuring = True
        try:
            self._configure(plan)
        finally:
            self._configuring = False

    def _configure(self, plan: Plan) -> None:
        """Make the process group of this quorum.

        Raises:
            MismatchError: this group's model or settings differ from the others'.
            CollectiveError: it could not be made, or another group differs.
        """
        self._configured = None
        self._broken = True
        prefix = self._prefix(plan)
        try:
            # A store whose process is stopped answers nothing and keeps no timeout of its own.
            deadline = Deadline.after(self._options.timeout)
            store = Attempt(lambda attempt: self._compare(attempt, plan, prefix)).wait(deadline)
            name = self._group.name or "0"
            self._pg.configure(prefix, name, plan.replica_rank, len(plan.members))
            Attempt(lambda _: withdraw(store, plan.replica_rank))  # nobody waits for it
        except TorchftError:
            raise
        except (RuntimeError, OSError) as error:
            ranks = ", ".join(f"{rank} {name}" for rank, name in enumerate(plan.members[:_NAMED]))
            raise CollectiveError(
                f"the process group of quorum {plan.quorum_id} could not be made: {error} "
                f"(members by rank: {ranks})"
            ) from error
        self._configured, self._broken = plan.quorum_id, False

    def _prefix(self, plan: Plan) -> str:
        """Where the members of this group rank meet."""
        return f"{plan.store_address}/torchft/{plan.quorum_id}/{self._group.rank}"

    def _compare(self, attempt: Attempt[Store], plan: Plan, prefix: str) -> Store:
        attempt.stage = f"all of {', '.join(plan.members)} to describe their models at {prefix}"
        store = self._stores.client(prefix, self._options.connect_timeout)
        exchange(
            store,
            self._fingerprint(),
            rank=plan.replica_rank,
            members=plan.members,
            reference=plan.reference,
            timeout=self._options.timeout,
        )
        self._once = {}
        return store

    def _fingerprint(self) -> Description:
        options = self._options
        return {
            "use_async_quorum": not options.sync,
            "world_size_mode": options.mode.name,
            "min_replica_size": options.min_replica_size,
            "check_finite": options.check_finite,
            **self.description,
            **self._listeners,
            **self._once,
        }

    def _exchange_state(self, transaction: Transaction, plan: Plan) -> None:
        if plan.serves:
            self._offering = transaction
            healing.offer(self._transport, plan, self._collect_state, self._options.timeout)
        if not plan.healing:
            return
        store = self._store(plan)
        if plan.replica_rank in plan.healing:
            self._heal(transaction, plan, store)
        if plan.anyone_heals:
            self._wait_for_heals(transaction, plan, store)

    def _store(self, plan: Plan) -> Store:
        try:
            return self._stores.client(self._prefix(plan), self._options.connect_timeout)
        except TimeoutError as error:
            raise CollectiveError(str(error)) from error

    def _wait_for_heals(self, transaction: Transaction, plan: Plan, store: Store) -> None:
        """Nobody begins to average before those who heal can: it may take them longer than any
        average may."""

        def is_over() -> str | None:
            generation = transaction.generation
            if transaction.broken:
                return "the step failed"
            if generation is not None and (generation.retired or generation.lost):
                return "a member left while another one healed"
            return None

        try:
            wait_for_heals(
                store,
                plan.step,
                plan.members,
                [rank for rank in plan.healing if rank != plan.replica_rank],
                counted=plan.counted,
                is_over=is_over,
                patience=self._patience,
            )
        except CollectiveError:
            if not transaction.broken:  # then its first error is the cause
                raise

    def _heal(self, transaction: Transaction, plan: Plan, store: Store) -> None:
        """Fetch the state, while the others are told how far it is."""
        before = self._bytes_received()
        telling = report_progress(
            store, plan.step, plan.replica_rank, self._bytes_received, self._patience
        )
        try:
            with telling:
                transaction.staged = plan.donor and self._fetch(plan, plan.donor)
        except HealError as error:
            # A group that is not counted goes on with its zeros: the others commit without it.
            transaction.report(error, at_home=not plan.participates)
        finally:
            transaction.healed_bytes = self._bytes_received() - before

    def _fetch(self, plan: Plan, donor: Donor) -> Any:
        return healing.fetch(
            self._transport,
            plan,
            donor,
            group_rank=self._group.rank,
            connect_timeout=self._options.connect_timeout,
            timeout=self._options.timeout,
        )

    def _bytes_received(self) -> int:
        return getattr(self._transport, "bytes_received", 0)
