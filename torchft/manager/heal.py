"""Moving live state between groups: what a donor offers, what a healing group takes.

The payload is `{"user": {key: state}, "torchft": {"step": …, "batches_committed": …}}`, read under
the lock that keeps optimizers out. A donor offers it until it votes; whoever has not fetched it by
then heals in a later step. A fetched state is only staged here: it is loaded on the training
thread (`queue.py`), and stands whatever the vote says, for it is the donor's commit.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.distributed import Store

from torchft.checkpointing import CheckpointTransport
from torchft.coordination import ManagerClient
from torchft.errors import CollectiveError, HealError, MismatchError, StateDictError
from torchft.manager.begin import prefix_of
from torchft.manager.heal_progress import Patience, report_progress, wait_for_heals
from torchft.manager.live_state import LiveState
from torchft.manager.plan import LEAST_TRIES, Donor, Plan
from torchft.manager.training_thread import NotReached
from torchft.process_group.stores import StoreClients
from torchft.sharded import is_any_fully_sharded

if TYPE_CHECKING:
    from torchft.manager.group import ReplicaGroup
    from torchft.manager.step import Context, Step

__all__ = ["Healer"]

_READ_SHARE = 0.75
"""The training thread may take so much of the timeout to come: who heals waits all of it."""

_log = logging.getLogger("torchft.manager.heal")


class Healer:
    """Offers this rank's state to others, and fetches theirs when this rank is behind."""

    def __init__(
        self,
        context: Context,
        group: ReplicaGroup,
        transport: CheckpointTransport[Any],
        state: LiveState,
        stores: StoreClients,
    ) -> None:
        self._context, self._options = context, context.options
        self._group = group
        self._transport = transport
        self._state = state
        self._stores = stores
        self._patience = Patience(
            self._options.timeout.total_seconds(), self._options.heal_limit.total_seconds()
        )
        self._unreadable: list[str] = []
        """Why the state could not be offered, the last times in a row."""
        self._offering: Step | None = None
        """The step for which the state is offered now."""

    def exchange(self, step: Step, plan: Plan) -> None:
        """Offer the state, or fetch it into `step.staged`, and wait for the others that heal.

        Raises:
            CollectiveError: another member could not heal, or left meanwhile.
            MismatchError: the donor's state is sharded in another way than this group's.
        """
        if plan.serves:
            self._offering = step
            self._offer(step, plan)
        if not plan.healing:
            return
        store = self._store(plan)
        if plan.replica_rank in plan.healing:
            self._heal(step, plan, store)
        if plan.anyone_heals:
            self._wait_for_heals(step, plan, store)

    def withdraw(self, step: Step) -> None:
        """The step is over: the state that was offered in it may change."""
        if self._offering is step:
            self._offering = None
            self._transport.disallow_checkpoint()

    def hopeless(self, plan: Plan) -> StateDictError | None:
        """Why this group must leave the job: the others wait for its state before the first step,
        and it cannot be read. Who has trained goes on without those that cannot heal from it."""
        begins = plan.bootstrap or not self._context.progress.has_committed
        if not begins or len(self._unreadable) < LEAST_TRIES:
            return None
        return StateDictError(
            f"{self._unreadable[-1]}. The others begin with the state of {plan.name}, which could "
            f"not be read {len(self._unreadable)} times in a row: mend its state_dict"
        )

    def _offer(self, step: Step, plan: Plan) -> None:
        """Let the members in `plan.serves` fetch the state, or tell them why there is none.

        A failure is theirs to notice and ours to log: it does not touch this group's step.
        """
        timeout = self._options.timeout
        try:
            state = self._read(step)
            self._transport.check_state(state)
            self._unreadable.clear()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._unreadable.append(reason)
            _say_failed(plan, error)
            with suppress(HealError, TimeoutError):  # they are gone: nobody is left to be told
                self._transport.refuse_checkpoint(list(plan.serves), plan.step, reason, timeout)
            return
        try:
            self._transport.send_checkpoint(
                dst_ranks=list(plan.serves), step=plan.step, state_dict=state, timeout=timeout
            )
        except Exception as error:
            _say_failed(plan, error)

    def _read(self, step: Step) -> Any:
        """The state, read on the training thread, which waits for the heal or gets a copy made."""
        at = self._context.progress.state_dict
        if not step.forms_beside:
            return self._state.collect(at)
        patience_s = _READ_SHARE * self._options.timeout.total_seconds()
        try:
            return self._context.training.call(partial(self._state.collect, at), patience_s)
        except NotReached as error:
            if is_any_fully_sharded():
                raise StateDictError(
                    f"{error}, and a sharded model is read nowhere else: give the manager a "
                    "timeout that is longer than a forward and a backward pass"
                ) from None
            _log.info("%s: the state is read beside it", error)
            return self._state.collect(at)

    def _heal(self, step: Step, plan: Plan, store: Store) -> None:
        """Fetch the state, while the others are told how far it is."""
        before = self._transport.bytes_received

        def received() -> int:
            return self._transport.bytes_received - before

        telling = report_progress(store, plan.step, plan.replica_rank, received, self._patience)
        try:
            with telling:
                step.staged = plan.donor and self._fetch(plan, plan.donor)
        except HealError as error:
            # A group that does not participate sends zeros: the others commit without it.
            step.report(error, local=not plan.participates)
        finally:
            step.healed_bytes = step.heal_bytes = received()

    def _fetch(self, plan: Plan, donor: Donor) -> Any:
        name, timeout = plan.members[donor.replica_rank], self._options.timeout
        try:
            client = ManagerClient(
                donor.manager_address, connect_timeout=self._options.connect_timeout
            )
            metadata = client._checkpoint_metadata(self._group.rank, timeout=timeout)
            return self._transport.recv_checkpoint(
                src_rank=donor.replica_rank, metadata=metadata, step=plan.step, timeout=timeout
            )
        except MismatchError:
            raise
        except Exception as error:
            then = "the next quorum asks another one" if plan.donors > 1 else "it is asked again"
            raise HealError(f"{error}; the donor was {name}: {then}") from error

    def _wait_for_heals(self, step: Step, plan: Plan, store: Store) -> None:
        """Nobody begins to average before those who heal can: it may take them longer than any
        average may."""

        def is_over() -> str | None:
            generation = step.generation
            if step.broken and not step.gave_way:
                return "the step failed"
            if generation is not None and (generation.retired or generation.lost):
                return "a member left while another one healed"
            return None

        try:
            others = wait_for_heals(
                store,
                plan.step,
                plan.members,
                [rank for rank in plan.healing if rank != plan.replica_rank],
                participating=plan.participating,
                is_over=is_over,
                patience=self._patience,
            )
            step.heal_bytes = max(step.heal_bytes, others)
        except CollectiveError:
            if not step.broken:  # then its first error is the cause
                raise

    def _store(self, plan: Plan) -> Store:
        prefix = prefix_of(plan, self._group.rank)
        try:
            return self._stores.client(prefix, self._options.connect_timeout)
        except TimeoutError as error:
            raise CollectiveError(str(error)) from error


def _say_failed(plan: Plan, error: Exception) -> None:
    names = ", ".join(plan.members[rank] for rank in plan.serves)
    said = "[%s - step %d] %s: %s: this state cannot be offered to %s"
    _log.error(said, plan.name, plan.step, type(error).__name__, error, names)
    _log.debug("the same, with where it came from", exc_info=error)
