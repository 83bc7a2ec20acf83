"""One step of a rank, from its quorum to its vote.

Everything that belongs to a step hangs on its `Step`: the plan, the averages in flight, the bytes
and the first error. So nothing outlives it: an average that fails late reports to the step that
started it, never to the one that runs by then.

Most often one step is open at a time, and the manager's own methods are about that one. With a
delay, `manager.steps.take()` hands a step over, and the next one can begin before it is closed:

    step = manager.steps.take()
    average = step.allreduce(delta)
    ...                                    # other steps begin and close meanwhile
    average.wait()
    if manager.steps.close(step): ...

An error may arrive on any thread, such as gloo's. The step acts on it there and then, without the
manager: it logs it and abandons its process group, so that no peer waits for this rank.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed import ReduceOp, Work
from torch.futures import Future

from torchft.errors import CollectiveError, NotFiniteError, StepError
from torchft.futures import future_timeout
from torchft.ledger import Bucket, Ledger
from torchft.manager import collectives
from torchft.manager.plan import Options, Phase, Plan
from torchft.manager.training_thread import TrainingThread
from torchft.process_group.account import Account

if TYPE_CHECKING:
    from datetime import timedelta

    from torchft.manager.average import Average, Name
    from torchft.manager.begin import QuorumGroup
    from torchft.manager.progress import Progress
    from torchft.manager.telemetry import StepLog
    from torchft.process_group.generation import Generation
    from torchft.quantization import Codec

__all__ = ["Context", "ExceptionWithTraceback", "Step"]

T = TypeVar("T")


class ExceptionWithTraceback(Exception):
    """An error together with the text of its stack, as `Manager.errored()` returns it."""

    def __init__(self, e: Exception) -> None:
        super().__init__(e)
        self.original_exception = e
        self.stack_trace = "".join(traceback.format_exception(e))

    def forget_frames(self) -> None:
        """Drop the stack frames, which hold tensors and process groups; the text stays."""
        error: BaseException | None = self.original_exception
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__


@dataclass(frozen=True)
class Context:
    """What all steps of one manager share."""

    group: QuorumGroup
    options: Options
    progress: Progress
    ledger: Ledger
    log: StepLog
    training: TrainingThread = field(default_factory=TrainingThread)


class Step:
    """One step between `start_quorum` and the vote."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.ledger = context.ledger
        self.phase = Phase.OPEN
        self.known_plan: Plan | None = None
        """What it will do, as soon as its quorum stands; `plan` waits for it."""
        self.error: ExceptionWithTraceback | None = None
        self.broken = False
        """An error that the collectives of this step do not survive."""
        self.gave_way = False
        """It failed so that somebody can heal: its peers are freed when that has ended."""
        self.failure: BaseException | None = None
        """No quorum came about: raised to the caller, since there is no step to discard."""
        self.staged: Any = None
        """A donor's state, fetched and not loaded yet."""
        self.detached = False
        """Taken over from a donor: its collectives are over, so no peer waits for this rank."""
        self.averages: list[Average] = []
        """What was begun in this step. The vote waits for all of it."""
        self.generation: Generation | None = None
        """Among whom it communicates, where its process group has generations."""
        self.account = Account()
        """What its collectives sent; they receive as many bytes as they send."""
        self.ledger_before = self.ledger.snapshot()
        self.offered_before = 0
        """Bytes of state sent when the step could begin to communicate."""
        self.healed_bytes = 0
        """Bytes of state received in it."""
        self.heal_bytes = 0
        """Bytes of the largest state that a member healed to in it, as far as is known."""
        self.committed: bool | None = None
        """How it was voted on; None before."""
        self.synced = False
        """Another group's final sync, in which all went well."""
        self.forms_beside = False
        """Its quorum forms on another thread than the one that trains."""
        self.begun_early = False
        """By a forward pass; whoever begins a step after it means this one."""
        self.taken = False
        """Somebody else than the manager closes it."""
        self.superseded = False
        """Closed or dropped, and a later step has begun: its errors concern nobody."""
        # In the order in which they are reached. The last one is set whatever happens.
        self.decided = threading.Event()
        self.configured = threading.Event()
        self.ready = threading.Event()

    # ------------------------------------------------------------------ begin

    @contextmanager
    def forming(self) -> Iterator[None]:
        """Form the step in here: an error of it is reported, any other is its `failure`, and
        whoever waits for the step is freed at the end."""
        try:
            yield
        except StepError as error:
            self.report(error)
        except BaseException as error:
            self.failure = error
        finally:
            self.finish_forming()

    def finish_forming(self) -> None:
        """Free whoever waits: the quorum stands, or `failure` says why not."""
        for reached in (self.decided, self.configured, self.ready):
            reached.set()
        self.context.training.wake()
        if self.gave_way:
            self.context.group.abandon(self.generation)

    @property
    def formed(self) -> bool:
        """Whether its quorum stands and its members can communicate, or it failed to form."""
        return self.ready.is_set()

    @property
    def plan(self) -> Plan:
        """What it will do. Waits until this group can communicate, and accounts the wait to what
        it was spent on; raises whatever kept the quorum from forming."""
        if not self.ready.is_set():
            self._wait_until_formed()
        if self.failure is not None:
            raise self.failure
        assert self.known_plan is not None
        return self.known_plan

    def _wait_until_formed(self) -> None:
        for bucket, reached in (Bucket.QUORUM, self.decided), (Bucket.CONFIGURE, self.configured):
            if not reached.is_set():
                with self.ledger.spending(bucket):
                    reached.wait()
        training, plan = self.context.training, self.known_plan
        if self.ready.is_set():
            return
        # All ranks of the groups see the same plan, so that none waits here for one that does not.
        if plan is not None and plan.anyone_heals and training.may_not_wait():
            self.give_way()
            return
        with self.ledger.spending(Bucket.HEAL):
            training.wait(self.ready)

    # ------------------------------------------------------------------ errors

    def report(self, error: Exception, *, local: bool = False) -> None:
        """Discard the step because of `error`. With `local` the other groups can commit it without
        this one, which goes on to take part in their collectives."""
        # The first one is the cause; those that come of giving up the rest add nothing. Only what
        # breaks the step says more than that an average is not finite.
        new = self.error is None or (self.not_finite and not isinstance(error, NotFiniteError))
        if new:
            self.error = ExceptionWithTraceback(error)
        self.broken = self.broken or not (local or self.detached)
        if self.superseded:
            return
        if new:
            self.context.log.error(self.context.progress.step, error)
        if self.broken:
            self.context.group.abandon(self.generation)

    def give_way(self) -> None:
        """Nothing is averaged in this step: it is in a backward pass in which the state that
        somebody waits for cannot be read, and after which it can."""
        if not self.gave_way:
            self.gave_way = True
            said = "another group heals, for which a sharded model is read after the backward pass"
            self.report(CollectiveError(said), local=True)
            self.broken = True
            if self.ready.is_set():
                self.context.group.abandon(self.generation)

    def report_error(self, error: Exception) -> None:
        """Discard it, because of `error`, and free the groups that wait for this one."""
        # All see the same average, so nobody waits for whoever finds it broken.
        self.report(error, local=isinstance(error, NotFiniteError))

    @property
    def failed(self) -> bool:
        """Whether an error was reported, so that it will be discarded."""
        return self.error is not None

    @property
    def not_finite(self) -> bool:
        """Whether all that is wrong with it is NaN or infinity in an average: then communication
        works, and every member discards it."""
        error = self.error
        return error is not None and isinstance(error.original_exception, NotFiniteError)

    # ------------------------------------------------------------------ communicate

    def allreduce(
        self,
        tensor: torch.Tensor,
        should_quantize: bool | str | Codec = False,
        reduce_op: ReduceOp.RedOpType = ReduceOp.AVG,
        *,
        error_feedback: torch.Tensor | None = None,
        name: Name | None = None,
        reports: bool = True,
    ) -> Work:
        """As `Manager.allreduce`. Unless it `reports`, an average that is not finite is for the
        caller to report, who asks `average.is_finite`."""
        return collectives.allreduce(
            self, tensor, should_quantize, reduce_op, error_feedback, name, reports
        )

    def ordered_mean(self, tensor: torch.Tensor, *, reports: bool = True) -> Work:
        """As `Manager.ordered_mean`; `reports` as in `allreduce`."""
        return collectives.ordered_mean(self, tensor, reports)

    def allgather(self, tensor: torch.Tensor) -> tuple[Work, list[torch.Tensor]]:
        """Gather `tensor` from the participating groups, as `Manager.allgather` does."""
        return collectives.gather(self, tensor)

    def complete(self) -> None:
        """Wait until all averages that were begun in it have arrived, or failed."""
        for average in self.averages:
            average.wait(self.context.options.timeout)

    def wrap_future(self, fut: Future[T], default: T, timeout: timedelta | None) -> Future[T]:
        """Give `fut` a deadline and a default value, as `Manager.wrap_future` does."""

        def or_default(done: Future[T]) -> T:
            try:
                return done.value()
            except Exception as error:
                self.report(error)
                return default

        return future_timeout(fut, timeout or self.context.options.timeout).then(or_default)

    # ------------------------------------------------------------------ beside other steps

    @property
    def untouched(self) -> bool:
        """Nothing was sent in it yet, and nothing went wrong: it may go on as if just begun."""
        return not (self.averages or self.failed or self.failure is not None)

    def is_meant_by_begin(self) -> bool:
        """Whether whoever begins a step now means this one, which a forward pass has begun."""
        early, self.begun_early = self.begun_early, False
        return early and self.untouched

    def carried(self) -> dict[str, Any]:
        """What `Steps.take_over` needs in a group that heals while this step is open."""
        plan, error = self.plan, self.error
        return {
            "quorum_id": plan.quorum_id,
            "members": list(plan.members),
            "participating": list(plan.participating),
            "failed": None if error is None else str(error.original_exception),
            "not_finite": self.not_finite,
        }

    def remain(self, members: tuple[str, ...]) -> None:
        """A later quorum has these members: a step that lost one of its own has failed."""
        lost = [one for one in self.plan.members if one not in members]
        if lost and not self.failed:
            self.report_error(CollectiveError(f"{', '.join(lost)} left while the step was open"))

    # ------------------------------------------------------------------ end

    def drop(self) -> None:
        """Never vote on it, unless that has begun: a heal or a new step has taken its place."""
        self.superseded = True
        if self.phase is Phase.OPEN:
            self.phase = Phase.IDLE
            self.release()

    def release(self) -> None:
        """Let go of what would keep tensors and its process group alive after the step."""
        self.averages = []
        if self.error is not None:
            self.error.forget_frames()
