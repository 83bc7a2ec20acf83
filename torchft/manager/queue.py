"""The steps that one rank has open: the one that its manager is about, and those that were taken.

steps.begin(transaction)             # the manager's, until somebody takes it
step = steps.take()                  # and closes it whenever it likes
steps.before_heals(plan)             # a later quorum stands: who is lost, what must be complete
steps.give_up(error)                 # nobody will close what was taken
with steps.healing(transaction): ... # what is taken over in here replaces what was taken before
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torchft.errors import CollectiveError, NotFiniteError
from torchft.manager.open_step import Means, OpenStep
from torchft.manager.plan import Phase, Plan, plan_of_others
from torchft.manager.transaction import Transaction

__all__ = ["OpenSteps"]


class OpenSteps:
    """In the order in which they were begun."""

    def __init__(self, means: Means) -> None:
        self.last: OpenStep | None = None
        """The one that was begun last, also when it has been closed."""
        self._means = means
        self._taken: list[OpenStep] = []

    @property
    def phase(self) -> Phase:
        """Where the step stands that the manager's own methods are about."""
        return Phase.IDLE if self.last is None or self.last.taken else self.last.phase

    def begin(self, transaction: Transaction) -> None:
        """One more; the one before it, when nobody took it, is dropped if it is still open."""
        if self.last is not None and not self.last.taken:
            self.last.drop()
        self._taken = [step for step in self._taken if step.phase is Phase.OPEN]
        self.last = OpenStep(transaction, self._means)

    def take(self) -> OpenStep:
        """The last one, from now on closed by the caller."""
        assert self.last is not None, "call start_quorum before take_step"
        return self._keep(self.last)

    def take_over(
        self,
        transaction: Transaction,
        *,
        quorum_id: int,
        members: Sequence[str],
        counted: Sequence[int],
        failed: str | None,
        not_finite: bool = False,
    ) -> OpenStep:
        """One of the donor's, while a heal is loaded: its collectives are over, its close is still
        to come. `failed` says why it will be discarded, if so; `not_finite`, that it is for NaN."""
        assert self.last is not None, "call start_quorum before take_over"
        transaction.plan = plan_of_others(
            self.last.plan, quorum_id=quorum_id, members=members, counted=counted
        )
        transaction.apart = True
        transaction.finish_forming()
        step = self._keep(OpenStep(transaction, self._means))
        if failed is not None:
            transaction.report(NotFiniteError(failed) if not_finite else CollectiveError(failed))
        return step

    def are_running(self, transaction: Transaction) -> bool:
        """Whether it is one of these."""
        steps = [self.last, *(step for step in self._taken if step.phase is Phase.OPEN)]
        return any(step is not None and step.transaction is transaction for step in steps)

    def are_open(self) -> bool:
        """Whether a step that was taken is still to be closed."""
        return any(step.phase is Phase.OPEN for step in self._taken)

    def before_heals(self, plan: Plan) -> None:
        """A quorum stands while others are open: what became of them, as all members see it."""
        for step in self._taken:
            if step.phase is Phase.OPEN and step.formed:
                step.remain(plan.members)
                if plan.anyone_heals:
                    step.complete()

    def give_up(self, error: Exception) -> None:
        """Nobody will close those that were taken: free whoever waits in them."""
        for step in self._taken:
            if step.phase is Phase.OPEN and not step.transaction.failed:
                step.report_error(error)

    @contextmanager
    def healing(self, transaction: Transaction) -> Iterator[None]:
        """What is taken over in here replaces what was taken before, all but the step of this
        transaction, in which the heal came; unless loading it fails."""
        before, self._taken = self._taken, []
        try:
            yield
        except BaseException:
            self._taken = before
            raise
        for step in before:
            if step.transaction is transaction:
                self._taken.append(step)
            else:
                step.drop()

    def _keep(self, step: OpenStep) -> OpenStep:
        step.taken = True
        self._taken.append(step)
        return step
