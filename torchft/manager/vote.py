"""How a step closes: what is under way ends, a heal is loaded, the ranks of the group vote, and the
step is recorded.

The counterpart of `forming`, always on the training thread. To apply or to discard is the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta

from torchft.errors import DiscardedTooOften, HealError
from torchft.ledger import Bucket, Ledger
from torchft.manager.collectives import Communicator
from torchft.manager.group import ReplicaGroup
from torchft.manager.plan import Options, Plan, Why, has_tried_all_donors, objection
from torchft.manager.progress import Progress
from torchft.manager.telemetry import StepLog
from torchft.manager.transaction import Transaction
from torchft.timeouts import inside_group

__all__ = ["Closer"]


_MANY_SKIPPED = {10**power for power in range(1, 7)}
_STUCK = (
    "the last %d steps were all discarded for NaN or infinity: if it is no search of a GradScaler, "
    "training stands still; go back to a checkpoint with a lower learning rate, or clip gradients"
)


class Closer:
    """Closes one step after the other for one rank, and keeps count of how they ended."""

    def __init__(
        self,
        *,
        group: ReplicaGroup,
        communicator: Communicator,
        options: Options,
        ledger: Ledger,
        log: StepLog,
        progress: Progress,
        load_staged: Callable[[Transaction], None],
        leave: Callable[[Transaction, Exception], None],
        withdraw: Callable[[Transaction], None],
        bytes_offered: Callable[[], int],
    ) -> None:
        self._group = group
        self._communicator = communicator
        self._options = options
        self._ledger = ledger
        self._log = log
        self._progress = progress
        self._load_staged = load_staged
        self._leave = leave
        self._withdraw = withdraw
        self._bytes_offered = bytes_offered
        self._offered_until_last = 0

    def heal(self, transaction: Transaction, plan: Plan) -> None:
        """Load a donor's state now, before a step that may stay open: where a rank of this group
        could not, none has healed, and the step's error says so on all of them. Also a rank that
        has nothing to load meets the others here.

        Raises as `close` does.
        """
        fresh = self._progress.fresh
        self._load_staged(transaction)
        if not plan.may_heal or self._group.world_size == 1:
            return
        healed = not transaction.failed
        all_have = self._all_say(plan.step, healed, self._patience(plan, None))
        if healed and not all_have:
            self._progress.fresh = fresh
            error = HealError("another rank of this group could not heal, so it heals once more")
            transaction.report(error, at_home=not plan.participates)

    def close(self, transaction: Transaction, plan: Plan, timeout: timedelta | None) -> bool:
        """Vote on the step: whether it is committed. `timeout`: of the collectives and the vote,
        in place of the manager's.

        Raises:
            TimeoutError: a rank of this group does not vote in `timeout`.
            DiscardedTooOften: more discarded steps in a row than `max_retries`, or too many heals
                that failed and cost the others a step each.
        """
        self._communicator.finish(transaction, plan, timeout or self._options.timeout)
        self._load_staged(transaction)
        why = objection(
            failed=transaction.failed,
            not_finite=transaction.not_finite,
            counted=len(plan.counted),
            min_replica_size=self._options.min_replica_size,
        )
        step = self._step_of(plan)
        committed = self._vote(transaction, step, why is None, self._patience(plan, timeout))
        if committed:
            self._progress.commit(len(plan.counted))
        elif self._is_only_not_finite(transaction, why, step, self._patience(plan, timeout)):
            why = Why.NOT_FINITE
            # Who was given a donor's state has loaded it: else that would be the step's error.
            self._progress.skip(met=plan.donor is None)
        else:
            self._discard(transaction, plan)
        self._record(transaction, plan, step, committed, why)
        self._leave_if_hopeless(transaction, plan)
        return committed

    def fall_behind(self, plan: Plan) -> None:
        """The step that was just committed could not be applied here."""
        self._progress.fall_behind(len(plan.counted))

    def close_without_step(
        self, transaction: Transaction, plan: Plan, timeout: timedelta | None
    ) -> bool:
        """All members meet, who is behind heals, no step is counted. Whether that went well.

        Raises as `close` does.
        """
        self._communicator.finish(transaction, plan, timeout or self._options.timeout)
        self._load_staged(transaction)
        why = Why.ERROR if transaction.failed else None
        step = self._step_of(plan)
        healed = self._vote(transaction, step, why is None, self._patience(plan, timeout))
        if healed:
            self._progress.meet()
        else:
            self._discard(transaction, plan)
            self._record(transaction, plan, step, False, why)
        return healed

    def _discard(self, transaction: Transaction, plan: Plan) -> None:
        error = transaction.error.original_exception if transaction.error else None
        could_not_heal = plan.donor is not None and isinstance(error, HealError)
        self._progress.discard(heal_failed=could_not_heal)

    def _leave_if_hopeless(self, transaction: Transaction, plan: Plan) -> None:
        """A group that cannot heal must not keep the others from committing."""
        failed = self._progress.heals_failed
        if not has_tried_all_donors(plan, failed):
            return
        cause = transaction.error.original_exception if transaction.error else "unknown"
        error = DiscardedTooOften(
            f"{cause}. {failed} heals of {self._group.replica_id} failed in a row and cost the "
            "other groups a step each, so it leaves the job: start it again"
        )
        self._leave(transaction, error)
        raise error

    def _step_of(self, plan: Plan) -> int:
        """What is voted on: later than planned when steps that opened before closed meanwhile."""
        return max(plan.step, self._progress.step)

    def _vote(self, transaction: Transaction, step: int, yes: bool, timeout: timedelta) -> bool:
        try:
            return self._all_say(step, yes, timeout)
        finally:
            with self._ledger.spending(Bucket.HEAL):
                self._withdraw(transaction)

    def _is_only_not_finite(
        self, transaction: Transaction, why: Why | None, step: int, timeout: timedelta
    ) -> bool:
        """Whether a step that was voted down has NaN in an average, at a rank of this group, and
        nothing else is wrong with it at any: the ranks of a sharded model see other averages."""
        finite_or_not = why in (None, Why.NOT_FINITE)
        if self._group.world_size == 1:
            return why is Why.NOT_FINITE
        return self._all_say(step, finite_or_not, timeout)

    def _patience(self, plan: Plan, timeout: timedelta | None) -> timedelta:
        """How long the ranks of this group wait for each other: another one may still heal, or wait
        for one that does."""
        timeout = timeout or inside_group(self._options.timeout)
        return timeout + self._options.heal_limit if plan.anyone_heals else timeout

    def _all_say(self, step: int, yes: bool, timeout: timedelta) -> bool:
        """Whether all ranks of this group say yes to what is asked of them at `step`."""
        with self._ledger.spending(Bucket.VOTE):
            return self._group.client.should_commit(self._group.rank, step, yes, timeout=timeout)

    def _record(
        self, transaction: Transaction, plan: Plan, step: int, committed: bool, why: Why | None
    ) -> None:
        reason = None if committed else (why or Why.ANOTHER_RANK).value
        if reason is not None and transaction.error is not None:
            reason = f"{reason}: {transaction.error.original_exception}"
        collectives = transaction.account.bytes_sent  # which move as much in as out
        self._log.closed(
            transaction,
            plan,
            step=step,
            committed=committed,
            why=reason,
            sent=collectives + self._offered_in(transaction),
            received=collectives + transaction.healed_bytes,
        )
        if reason is not None:
            self._warn(step, reason, error_said=transaction.error is not None)

    def _say_skipped(self, step: int, skipped: int) -> None:
        if skipped in _MANY_SKIPPED:
            self._log.say(logging.WARNING, step, _STUCK, skipped)
        else:
            self._log.say(logging.DEBUG, step, "skipped, %d in a row", skipped)

    def _offered_in(self, transaction: Transaction) -> int:
        """State sent since the step began, or since the last record of one that was open at the
        same time: no byte is in two records."""
        before, self._offered_until_last = self._offered_until_last, self._bytes_offered()
        return self._offered_until_last - max(before, transaction.offered_before)

    def _warn(self, step: int, reason: str, *, error_said: bool) -> None:
        """A step was discarded; after too many in a row it is no use to go on."""
        failures, most = self._progress.discarded, self._options.max_retries
        if self._progress.skipped:
            # The error has been said already, and a gradient scaler makes some on purpose.
            self._say_skipped(step, self._progress.skipped)
            return
        # One line an event: an error was said when it happened.
        level = logging.DEBUG if error_said else logging.WARNING
        self._log.say(level, step, "%s: step discarded, %d in a row", reason, failures)
        if most is not None and failures > most:
            raise DiscardedTooOften(
                f"{self._group.replica_id} discarded {failures} steps in a row at step "
                f"{step}, more than max_retries={most}; the last one because of: {reason}"
            )
