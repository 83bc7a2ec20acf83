"""A step between its quorum and its vote.

Most often one is open at a time, and the manager's own methods mean that one. Whoever lets inner
steps run while an average travels *takes* it from the manager (`Manager.take_step`), and the next
one can be begun: each has its own members, averages and error, and is closed by its own vote.

    step = manager.take_step()
    average = step.allreduce(delta)
    ...                                    # other steps begin and close meanwhile
    average.wait()
    if step.should_commit(): ...

What holds between open steps:

- The step that a rank reports counts closed ones, so nobody looks behind for having one open.
- A step whose members are not all in a later quorum has lost one, and fails for all that remain.
- Before anybody heals, all members complete what is open; who heals takes the results over.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed import ReduceOp, Work
from torch.futures import Future

from torchft.collectives import codec_for
from torchft.errors import CollectiveError, NotFiniteError, SettingsError
from torchft.futures import future_timeout
from torchft.manager.average import Name
from torchft.manager.collectives import Communicator
from torchft.manager.plan import Phase, Plan, follow
from torchft.manager.transaction import ExceptionWithTraceback, Transaction
from torchft.manager.vote import Closer

if TYPE_CHECKING:
    from torchft.quantization import Codec

__all__ = ["Means", "OpenStep"]

T = TypeVar("T")


@dataclass(frozen=True)
class Means:
    """What a manager runs its steps with."""

    communicator: Communicator
    closer: Closer
    timeout: timedelta
    """Of a collective."""


class OpenStep:
    """One step of a manager that is not voted on yet."""

    def __init__(self, transaction: Transaction, means: Means) -> None:
        self.transaction = transaction
        self.phase = Phase.OPEN
        self.committed: bool | None = None
        """How it was voted on; None before."""
        self.begun_early = False
        """By a forward pass; whoever begins a step after it means this one."""
        self.taken = False
        """Somebody else than the manager closes it."""
        self.settled = False
        """It was the settling round of a run, and all went well in it."""
        self._means = means

    # ------------------------------------------------------------------ communicate

    def allreduce(
        self,
        tensor: torch.Tensor,
        should_quantize: bool | str | Codec = False,
        reduce_op: ReduceOp.RedOpType = ReduceOp.AVG,
        *,
        unsaid: torch.Tensor | None = None,
        name: Name | None = None,
        reports: bool = True,
    ) -> Work:
        """As `Manager.allreduce`. Unless it `reports`, an average that is not finite is for the
        caller to report, who asks `average.is_finite`.

        Raises:
            SettingsError: `unsaid` without a codec, or a sparse tensor.
        """
        _refuse_sparse("allreduce", tensor)
        codec = codec_for(should_quantize, tensor.device)
        communicator = self._means.communicator
        called = (name or _by_shape) if reports else None
        if codec is not None:
            return communicator.quantized(
                self.transaction, tensor, codec, reduce_op, unsaid, called
            )
        if unsaid is not None:
            raise SettingsError("all of a tensor arrives as it is: unsaid goes with a codec")
        return communicator.reduce(self.transaction, tensor, reduce_op, called)

    def ordered_mean(self, tensor: torch.Tensor, *, reports: bool = True) -> Work:
        """As `Manager.ordered_mean`; `reports` as in `allreduce`."""
        _refuse_sparse("ordered_mean", tensor)
        called = _by_shape if reports else None
        return self._means.communicator.ordered_mean(self.transaction, tensor, called)

    def allgather(self, tensor: torch.Tensor) -> tuple[Work, list[torch.Tensor]]:
        """Gather a tensor of all groups, as `Manager.allgather` does."""
        _refuse_sparse("allgather", tensor)
        return self._means.communicator.gather(self.transaction, tensor)

    @property
    def check_finite(self) -> bool:
        """NaN and infinity in what arrives discard it."""
        return self._means.communicator.check_finite

    @property
    def formed(self) -> bool:
        """Its quorum stands, and its state has moved; or it failed to form."""
        return self.transaction.ready.is_set()

    def heal(self) -> None:
        """Load what this group was given when it formed, if anything, on all of its ranks or on
        none."""
        self._means.closer.heal(self.transaction, self.plan)

    def complete(self) -> None:
        """Wait until all that was begun in it has arrived, or failed."""
        for average in self.transaction.averages:
            average.wait(self._means.timeout)

    def report_error(self, error: Exception) -> None:
        """Have the step discarded because of `error`."""
        # All see the same average, so nobody waits for whoever finds it broken.
        self.transaction.report(error, at_home=isinstance(error, NotFiniteError))

    def errored(self) -> ExceptionWithTraceback | None:
        """The error that will discard the step, None without one."""
        return self.transaction.error

    def carried(self) -> dict[str, Any]:
        """What `Manager.take_over` needs where this step is taken over."""
        error = self.errored()
        return {
            "quorum_id": self.plan.quorum_id,
            "members": list(self.plan.members),
            "counted": list(self.plan.counted),
            "failed": None if error is None else str(error.original_exception),
            "not_finite": self.transaction.not_finite,
        }

    def wrap_future(self, fut: Future[T], default: T, timeout: timedelta | None) -> Future[T]:
        """Guard a future with a deadline, as `Manager.wrap_future` does."""

        def or_default(done: Future[T]) -> T:
            try:
                return done.value()
            except Exception as error:
                self.transaction.report(error)
                return default

        return future_timeout(fut, timeout or self._means.timeout).then(or_default)

    @property
    def untouched(self) -> bool:
        """Nothing was sent in it yet, and nothing went wrong: it may go on as if just begun."""
        it = self.transaction
        return not (it.averages or it.failed or it.failure is not None)

    def expect_begin(self) -> bool:
        """Whether whoever begins a step now means this one."""
        early, self.begun_early = self.begun_early, False
        return early and self.untouched

    def remain(self, members: tuple[str, ...]) -> None:
        """A later quorum has these members: a step that lost one of its own has failed."""
        lost = [one for one in self.plan.members if one not in members]
        if lost and not self.transaction.failed:
            self.report_error(CollectiveError(f"{', '.join(lost)} left while the step was open"))

    # ------------------------------------------------------------------ vote

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        """As `Manager.should_commit`; a settling round is never a commit."""
        if self.plan.settling:
            self.settled = self._close(timeout, with_step=False)
            return False
        return self._close(timeout, with_step=True)

    def close_opening(self, timeout: timedelta | None = None) -> bool:
        """All members meet, who is behind heals, no step is counted. Whether that went well."""
        return self._close(timeout, with_step=False)

    def fall_behind(self) -> None:
        """It was just committed, and could not be applied here: heal it from the others."""
        self._means.closer.fall_behind(self.plan)

    def drop(self) -> None:
        """A heal has taken its place, unless it is being voted on: nothing of it is applied."""
        if self.phase is Phase.OPEN:
            self.phase = Phase.IDLE
            self.transaction.release()

    def _close(self, timeout: timedelta | None, *, with_step: bool) -> bool:
        self.phase = follow(self.phase, Phase.VOTING)
        closer = self._means.closer
        close = closer.close if with_step else closer.close_without_step
        try:
            self.committed = close(self.transaction, self.plan, timeout)
            return self.committed
        finally:
            self.phase = follow(self.phase, Phase.IDLE)
            self.transaction.release()

    @property
    def plan(self) -> Plan:
        """What it will do; waits for the quorum, and raises what kept it from forming."""
        return self.transaction.wait_formed()


def _by_shape(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"a tensor of shape {list(tensor.shape)}": tensor}


def _refuse_sparse(what: str, tensor: torch.Tensor) -> None:
    """Backends take a tensor for one piece of memory."""
    if tensor.layout is not torch.strided:
        raise SettingsError(
            f"{what} of a sparse tensor of shape {tuple(tensor.shape)}: give tensor.to_dense(), "
            "or make the nn.Embedding whose gradient it is with sparse=False"
        )
