"""The steps of one rank: the one that its manager is about, and those that are open beside it.

    steps.begin(request, wait=False)     # a quorum forms; the step is `steps.last`
    step = steps.take()                  # somebody else than the manager closes it
    steps.close(step)                    # the vote; True: apply

Here it all comes together: `begin.py` says who is there, `heal.py` moves state, `vote.py` asks the
group's other ranks. Each returns what it found, and `Steps` acts on it.

What holds between open steps:

- The step that a rank reports counts closed ones, so nobody looks behind for having one open.
- A step whose members are not all in a later quorum has lost one, and fails for all that remain.
- Before anybody heals, all members complete what is open; who heals takes the results over.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future as ThreadFuture
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

from torchft.checkpointing import CheckpointTransport
from torchft.errors import (
    CollectiveError,
    HealError,
    MismatchError,
    NotFiniteError,
    PhaseError,
    StateDictError,
)
from torchft.ledger import Bucket
from torchft.manager import collectives
from torchft.manager.background import Background
from torchft.manager.begin import Beginner, Request
from torchft.manager.fingerprint import Fingerprint
from torchft.manager.group import ReplicaGroup
from torchft.manager.heal import Healer
from torchft.manager.listeners import StepListeners
from torchft.manager.live_state import LiveState
from torchft.manager.plan import Phase, Plan, follow, plan_of_others
from torchft.manager.starting_state import StartingState
from torchft.manager.step import Context, Step
from torchft.manager.vote import Outcome, Verdict, Voter
from torchft.peers import Place

__all__ = ["Steps"]

T = TypeVar("T")


class Steps:
    """Begins, heals and closes the steps of one rank.

    Attributes:
        last: the step that was begun last, also when it has been closed; None before the first.
        committed: the plan of the step that was committed last; None before the first.
    """

    def __init__(
        self,
        context: Context,
        group: ReplicaGroup,
        transport: CheckpointTransport[Any],
        state: LiveState,
        fingerprint: Fingerprint,
        listeners: StepListeners,
        starting_state: StartingState,
    ) -> None:
        self.last: Step | None = None
        self.committed: Plan | None = None
        self._context, self._progress = context, context.progress
        self._group, self._transport, self._state = group, transport, state
        self._fingerprint, self._listeners = fingerprint, listeners
        self._beginner = Beginner(context, group, transport, fingerprint, starting_state)
        self._healer = Healer(context, group, transport, state, self._beginner.stores)
        self._voter = Voter(context, group)
        self._executor = Background("torchft_quorum")
        self._forming: ThreadFuture[None] | None = None
        self._taken: list[Step] = []
        self._shut_down = False

    # ------------------------------------------------------------------ where it stands

    @property
    def phase(self) -> Phase:
        """Where the step stands that the manager's own methods are about."""
        if self._shut_down:
            return Phase.CLOSED
        return Phase.IDLE if self.last is None or self.last.taken else self.last.phase

    @property
    def is_open(self) -> bool:
        """Whether a step was begun that is not voted on yet, and that nobody took."""
        return self.phase is Phase.OPEN

    @property
    def has_met(self) -> bool:
        """Whether this process has begun from the others' state, or they from its."""
        return self.last is not None and not self._progress.fresh

    @property
    def needs_new(self) -> bool:
        """Whether no step is open, or only one that failed or in which something was sent."""
        return not (self.is_open and self.begun("needs_new").untouched)

    @property
    def voted(self) -> Step | None:
        """The step that was voted on last; None before there is one, and while one is open."""
        return None if self.is_open else self.last

    def begun(self, what: str) -> Step:
        """The step that was begun last; AssertionError says to begin one before `what`."""
        assert self.last is not None, f"call start_quorum before {what}"
        return self.last

    # ------------------------------------------------------------------ begin

    def request(self, place: Place, timeout: timedelta, **how: Any) -> Request:
        """A request for a quorum, from where this rank stands now; `how` as in `Request`."""
        return Request(place, timeout, replace(self._progress), **how)

    def begin(self, request: Request, *, wait: bool) -> None:
        """Begin a step. An open one that nobody took is discarded.

        Args:
            wait: until its quorum stands and this group has healed; else that happens in the
                background, but for the first quorum of a process and in sync mode.

        Raises:
            TimeoutError, QuorumError: no quorum, as far as it is waited for.
            StateDictError: state cannot travel, or what this group was given cannot be loaded.
            MismatchError: what this group was given is sharded in another way.
        """
        if self._forming is not None:
            self._context.training.wait(self.begun("begin").ready)
            self._forming.result()
        if self.is_open:
            self._give_back(self.begun("start_quorum"))
        follow(self.phase, Phase.OPEN)
        if self._fingerprint.update(*self._listeners.before_step()):
            self._context.group.renew()
        if not self._open_ones():  # what is open is waited for where the state is read
            check, has_committed = self._transport.check_state, self._progress.has_committed
            self._state.verify(check, has_committed=has_committed)
        step = self._next()
        if self._context.options.sync or wait or self._progress.fresh:
            self.form(step, request)
            if request.place is Place.AFTER:
                self.heal(step)
            else:
                self._load(step, step.plan)
        else:
            step.forms_beside = True
            self._forming = self._executor.submit(self.form, step, request)

    def begin_early(self) -> None:
        """Begin a step, if none is open, for a forward pass that may come before `start_quorum`,
        which then goes on with it."""
        if not self.is_open:
            timeout = self._context.options.quorum_timeout
            self.begin(self.request(Place.BEFORE, timeout), wait=False)
            self.begun("begin_early").begun_early = True

    def form(self, step: Step, request: Request) -> None:
        """Form the quorum of `step`, its process group, and exchange state with who heals. What
        goes wrong is the step's `error` or `failure`; nothing is raised."""
        with step.forming():
            plan = self._beginner.ask(step, request)
            self._beginner.configure(step, plan)
            step.offered_before = self._transport.bytes_sent
            step.configured.set()
            self.meet(plan)
            with self._context.ledger.spending(Bucket.HEAL):
                self._healer.exchange(step, plan)

    def meet(self, plan: Plan) -> None:
        """A quorum stands while steps are open: fail those that lost a member, and complete the
        others before anybody heals."""
        for step in self._open_ones():
            if step.formed:
                step.remain(plan.members)
                if plan.anyone_heals:
                    step.complete()

    def in_background(self, call: Callable[[], T]) -> ThreadFuture[T]:
        """Run `call` when the quorum has formed that was begun last, and what was given earlier."""
        return self._executor.submit(call)

    def _next(self) -> Step:
        """One more step; the one before it, when nobody took it, is dropped if it is still open."""
        for step in [self.last, *self._taken]:
            if step is not None and (step.phase is Phase.IDLE or not step.taken):
                step.drop()
        self._taken = self._open_ones()
        self.last = Step(self._context)
        return self.last

    def _give_back(self, step: Step) -> None:
        """A step was begun and not voted on: free whoever waits for this group in it."""
        if step.failure is None and len(step.plan.members) > 1:
            step.report(PhaseError("the step is begun anew before it was voted on"))
            self._healer.withdraw(step)

    def _open_ones(self) -> list[Step]:
        return [step for step in self._taken if step.phase is Phase.OPEN]

    # ------------------------------------------------------------------ beside the manager's own

    def take(self) -> Step:
        """The step that was begun last, to be closed by the caller: others can begin before that.

        Without `start_quorum` before it, AssertionError.
        """
        return self._keep(self.begun("take"))

    def take_over(
        self,
        *,
        quorum_id: int,
        members: Sequence[str],
        participating: Sequence[int],
        failed: str | None,
        not_finite: bool = False,
    ) -> Step:
        """Go on with a step that the donor has open, while a heal is loaded.

        Its collectives are over; its close is still to come. The arguments are those that
        `Step.carried` gives: `failed` says why it will be discarded, `not_finite` that it is for
        NaN alone.
        """
        step = Step(self._context)
        step.known_plan = plan_of_others(
            self.begun("take_over").plan,
            quorum_id=quorum_id,
            members=members,
            participating=participating,
        )
        step.detached = True
        step.finish_forming()
        if failed is not None:
            step.report(NotFiniteError(failed) if not_finite else CollectiveError(failed))
        return self._keep(step)

    def _keep(self, step: Step) -> Step:
        step.taken = True
        self._taken.append(step)
        return step

    # ------------------------------------------------------------------ heal

    def heal(self, step: Step) -> None:
        """Load a donor's state now, before a step that may stay open, on all ranks of the group or
        on none: where one could not, the step's error says so on all of them.

        Raises:
            StateDictError: the state cannot be loaded. This rank has left the job by then.
            TimeoutError: a rank of this group does not come in time.
        """
        plan, fresh = step.plan, self._progress.fresh
        self._load(step, plan)
        if not self._voter.all_healed(step, plan) and not step.failed:
            self._progress.fresh = fresh
            error = HealError("another rank of this group could not heal, so it heals once more")
            step.report(error, local=not plan.participates)

    def _load(self, step: Step, plan: Plan) -> None:
        """Load the state that was fetched for this step, if any.

        What cannot be loaded now cannot be at the next try either, and every try costs the other
        groups a step: so the whole group ends after the first one.
        """
        staged, step.staged = step.staged, None
        if staged is None or plan.donor is None:
            return
        before, donor = self._progress.step, plan.members[plan.donor.replica_rank]
        source = f"step {plan.step} of {donor}, at {plan.name}"
        with self._context.ledger.spending(Bucket.HEAL):
            try:
                with self.replaced_by_heal(step):
                    self._state.load(staged["user"], source)
            except (StateDictError, MismatchError) as error:
                self._leave(step, error)
                raise
            self._progress.load_state_dict(staged["torchft"])
        # With a delay others begin before the one in which it healed is closed. Should another rank
        # of this group have failed to heal, it stays fresh, and so does the group.
        self._progress.fresh = False
        now = self._progress.step
        self._context.log.say(logging.INFO, before, "healed from %s, now at step %d", donor, now)

    @contextmanager
    def replaced_by_heal(self, healing: Step) -> Iterator[None]:
        """What is taken over in here replaces what was taken before, all but the step `healing`,
        in which the heal came; unless loading it fails."""
        before, self._taken = self._taken, []
        try:
            yield
        except BaseException:
            self._taken = before
            raise
        for step in before:
            if step is healing:
                self._taken.append(step)
            else:
                step.drop()

    # ------------------------------------------------------------------ vote

    def close(self, step: Step, timeout: timedelta | None = None, *, counts: bool = True) -> bool:
        """Finish what is under way in the step, heal, vote, and record how it ended.

        Args:
            timeout: of the collectives and the vote, in place of the manager's.
            counts: False where the members only meet, so that whoever is behind heals, and no step
                is committed. The final sync of another group is never a commit either.

        Returns:
            Whether the step is to be applied; without a step to count, whether all went well.

        Raises:
            PhaseError: the step is not open.
            TimeoutError: a rank of this group does not vote in time.
            DiscardedTooOften: more discarded steps in a row than `max_retries`, or too many heals
                that failed and cost the others a step each.
            DeviceLostError: a device of this rank failed. The group has left the job by then.
        """
        plan = step.plan
        step.phase = follow(step.phase, Phase.VOTING)
        try:
            outcome = self._decide(step, plan, timeout, counts and not plan.final_sync)
            self._count(plan, outcome)
            self._voter.record(step, plan, outcome, self._transport.bytes_sent)
            if plan.final_sync:
                step.synced = counts and outcome.went_well
            else:
                self._leave_if_hopeless(step, plan)
            committed = outcome.verdict is Verdict.COMMITTED
            step.committed = committed if counts else outcome.went_well
            return step.committed
        finally:
            step.phase = Phase.IDLE
            step.release()

    def fall_behind(self, step: Step) -> None:
        """It was just committed, and could not be applied here: heal it from the others."""
        self._progress.fall_behind(len(step.plan.participating))

    def _decide(self, step: Step, plan: Plan, timeout: timedelta | None, counts: bool) -> Outcome:
        collectives.finish(step, timeout or self._context.options.timeout)
        self._load(step, plan)
        try:
            return self._voter.vote(step, plan, timeout, counts=counts)
        finally:
            with self._context.ledger.spending(Bucket.HEAL):
                self._healer.withdraw(step)

    def _count(self, plan: Plan, outcome: Outcome) -> None:
        match outcome.verdict:
            case Verdict.COMMITTED:
                self._progress.commit(len(plan.participating))
                self.committed = plan
            case Verdict.SYNCED:
                self._progress.meet()
            case Verdict.SKIPPED:
                # Who was given a donor's state has loaded it: else that would be the step's error.
                self._progress.skip(met=plan.donor is None)
            case Verdict.DISCARDED:
                self._progress.discard(heal_failed=outcome.heal_failed)

    # ------------------------------------------------------------------ end

    def _leave_if_hopeless(self, step: Step, plan: Plan) -> None:
        hopeless = self._voter.hopeless(step, plan) or self._healer.hopeless(plan)
        if hopeless is not None:
            self._leave(step, hopeless)
            raise hopeless

    def _leave(self, step: Step, error: Exception) -> None:
        """Leave the job: free the peers of this step, and tell this group's other ranks why."""
        step.report(error)
        self._group.end(f"{type(error).__name__}: {error}")
        self.shutdown(wait=False)

    def shutdown(self, wait: bool = True) -> None:
        """Free the server, the transport and the threads. Calling it again does nothing."""
        if self._shut_down:
            return
        self._shut_down = True
        self._beginner.stop_waiting()
        self._context.training.close()
        # The server first: a quorum that is still waited for then ends at once.
        self._group.leave()
        error = PhaseError("the manager was shut down while the step was open")
        for step in self._open_ones():
            if not step.failed:
                step.report_error(error)
        self._transport.shutdown(wait=wait)
        self._executor.shutdown(wait=wait)
        self._context.group.pg.shutdown()
        self._context.log.close()
