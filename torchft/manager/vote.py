"""How a step ends: the ranks of the group vote, and the step is recorded.

Always on the training thread. `Voter.vote` asks and returns an `Outcome`; `record` writes it down.
To apply or to discard is the caller's.
"""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from torchft.devices import is_lost
from torchft.errors import (
    DeviceLostError,
    DiscardedTooOften,
    DonorRefusedError,
    HealError,
    TorchftError,
)
from torchft.ledger import Bucket
from torchft.manager.plan import Plan, Why, has_tried_all_donors, objection
from torchft.timeouts import inside_group

if TYPE_CHECKING:
    from torchft.manager.group import ReplicaGroup
    from torchft.manager.step import Context, Step

__all__ = ["Outcome", "Verdict", "Voter"]

_MANY_SKIPPED = {10**power for power in range(1, 7)}
_STUCK = (
    "the last %d steps were all discarded for NaN or infinity: if it is no search of a GradScaler, "
    "training stands still; go back to a checkpoint with a lower learning rate, or clip gradients"
)


class Verdict(enum.Enum):
    """How a step ended, at all ranks of the group alike."""

    COMMITTED = "committed"
    SYNCED = "synced"
    """All members met and whoever was behind has healed; no step was to be counted."""
    SKIPPED = "skipped"
    """Discarded for NaN or infinity in an average, and nothing else."""
    DISCARDED = "discarded"


@dataclass(frozen=True)
class Outcome:
    """What the ranks of a group decided about one step."""

    verdict: Verdict
    step: int
    """What was voted on: later than planned when steps that opened before closed meanwhile."""
    why: Why | None
    """What this rank had against it."""
    heal_failed: bool
    """This rank was to heal in the step, and could not."""

    @property
    def went_well(self) -> bool:
        """Whether the step is to be applied, or all members are in sync."""
        return self.verdict in (Verdict.COMMITTED, Verdict.SYNCED)


class Voter:
    """Votes on one step after the other for one rank, with the other ranks of its group."""

    def __init__(self, context: Context, group: ReplicaGroup) -> None:
        self._context, self._options = context, context.options
        self._group = group
        self._offered_until_last = 0

    def all_healed(self, step: Step, plan: Plan) -> bool:
        """Whether all ranks of this group have healed in a step that stays open, where each of
        them may have had to. Also a rank that had nothing to load meets the others here.

        Raises:
            TimeoutError: a rank of this group does not say so in time.
        """
        if not plan.may_heal or self._group.world_size == 1:
            return True
        return self._all_say(plan.step, not step.failed, self._patience(step, plan, None))

    def vote(self, step: Step, plan: Plan, timeout: timedelta | None, *, counts: bool) -> Outcome:
        """Ask all ranks of this group whether the step went well.

        Args:
            timeout: of the vote, in place of the manager's.
            counts: whether it is a step to be committed; else the members only meet.

        Raises:
            TimeoutError: a rank of this group does not vote in time.
        """
        why = self._objection(step, plan, counts)
        number = max(plan.step, self._context.progress.step)
        patience = self._patience(step, plan, timeout)
        if self._all_say(number, why is None, patience):
            verdict = Verdict.COMMITTED if counts else Verdict.SYNCED
        elif counts and self._is_only_not_finite(why, number, patience):
            verdict, why = Verdict.SKIPPED, Why.NOT_FINITE
        else:
            verdict = Verdict.DISCARDED
        error = step.error.original_exception if step.error else None
        could_not_heal = plan.donor is not None and isinstance(error, HealError)
        return Outcome(verdict, number, why, could_not_heal)

    def record(self, step: Step, plan: Plan, outcome: Outcome, offered: int) -> None:
        """Log how the step ended, and write its record; `offered`: bytes of state sent so far.

        Raises:
            DiscardedTooOften: more discarded steps in a row than `max_retries`.
        """
        if outcome.verdict is Verdict.SYNCED:
            return
        committed = outcome.verdict is Verdict.COMMITTED
        reason = None if committed else (outcome.why or Why.ANOTHER_RANK).value
        if reason is not None and step.error is not None:
            reason = f"{reason}: {step.error.original_exception}"
        collectives = step.account.bytes_sent  # which move as much in as out
        self._context.log.closed(
            step,
            plan,
            number=outcome.step,
            committed=committed,
            why=reason,
            sent=collectives + self._offered_in(step, offered),
            received=collectives + step.healed_bytes,
        )
        if reason is not None:
            self._warn(outcome.step, reason, error_said=step.error is not None)

    def hopeless(self, step: Step, plan: Plan) -> TorchftError | None:
        """Why this group must leave the job: one whose device failed, or that cannot heal with any
        donor, tries for ever and may keep the others from committing. None while it may go on."""
        failed = self._context.progress.heals_failed
        cause = step.error.original_exception if step.error else None
        if is_lost(cause):
            return DeviceLostError(
                f"a device of {self._group.replica_id} failed: {cause}. This process cannot use it "
                "any more, so the group leaves the job, and the others go on: start it again"
            )
        refusal = cause.__cause__ if cause else None
        refused = isinstance(refusal, DonorRefusedError) and refusal.is_lasting
        if not has_tried_all_donors(plan, failed, refused=refused):
            return None
        then = "mend its state_dict, and start this group again" if refused else "start it again"
        return DiscardedTooOften(
            f"{cause}. {failed} heals of {self._group.replica_id} failed in a row, so it leaves "
            f"the job: {then}"
        )

    def _objection(self, step: Step, plan: Plan, counts: bool) -> Why | None:
        if not counts:
            return Why.ERROR if step.failed else None
        return objection(
            failed=step.failed,
            not_finite=step.not_finite,
            participating=len(plan.participating),
            min_replica_size=self._options.min_replica_size,
        )

    def _is_only_not_finite(self, why: Why | None, number: int, patience: timedelta) -> bool:
        """Whether a step that was voted down has NaN in an average, at a rank of this group, and
        nothing else is wrong with it at any: the ranks of a sharded model see other averages."""
        if self._group.world_size == 1:
            return why is Why.NOT_FINITE
        return self._all_say(number, why in (None, Why.NOT_FINITE), patience)

    def _patience(self, step: Step, plan: Plan, timeout: timedelta | None) -> timedelta:
        """How long the ranks of this group wait for each other: another one may still heal, or wait
        for one that does."""
        timeout = timeout or inside_group(self._options.timeout)
        if not plan.anyone_heals:
            return timeout
        return timeout + self._options.longest_heal(step.heal_bytes)

    def _all_say(self, number: int, yes: bool, timeout: timedelta) -> bool:
        """Whether all ranks of this group say yes to what is asked of them at this step."""
        with self._context.ledger.spending(Bucket.VOTE):
            return self._group.client.should_commit(self._group.rank, number, yes, timeout=timeout)

    def _offered_in(self, step: Step, offered: int) -> int:
        """State sent since the step began, or since the last record of one that was open at the
        same time: no byte is in two records."""
        before, self._offered_until_last = self._offered_until_last, offered
        return offered - max(before, step.offered_before)

    def _warn(self, number: int, reason: str, *, error_said: bool) -> None:
        """A step was discarded; after too many in a row it is no use to go on."""
        progress, most = self._context.progress, self._options.max_retries
        say = self._context.log.say
        if progress.skipped:
            # The error has been said already, and a gradient scaler makes some on purpose.
            if progress.skipped in _MANY_SKIPPED:
                say(logging.WARNING, number, _STUCK, progress.skipped)
            else:
                say(logging.DEBUG, number, "skipped, %d in a row", progress.skipped)
            return
        # One line an event: an error was said when it happened.
        level = logging.DEBUG if error_said else logging.WARNING
        say(level, number, "%s: step discarded, %d in a row", reason, progress.discarded)
        if most is not None and progress.discarded > most:
            raise DiscardedTooOften(
                f"{self._group.replica_id} discarded {progress.discarded} steps in a row at step "
                f"{number}, more than max_retries={most}; the last one because of: {reason}"
            )
