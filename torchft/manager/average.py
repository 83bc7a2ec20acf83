"""A managed all-reduce: the sum travels, the division follows it, whoever waits and whether or not.

Three can finish it, and exactly one does: `wait`, the completion of its future, or the vote, which
finishes every average of its step. So an average is an average even when nobody waits for it.
A failure is the error of the step that started it: never of a later one, never a raise. An average
that has NaN or infinity in it is such an error too, judged while it is divided (`finite.py`).

When a connection ends, gloo fails what is pending, but overlooks an operation that sends in that
very moment, which then waits for its whole timeout. So what takes long is looked at now and then,
and given up when its members are gone.

What a device runs by itself holds up the current stream instead of the host: its deadline is the
watchdog's of the process group, and its failure is found at the vote.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch.distributed import Work
from torch.futures import Future

from torchft.errors import CollectiveError
from torchft.finite import divide, not_finite
from torchft.futures import call_after, future_on
from torchft.ledger import Bucket
from torchft.process_group.account import paid_by
from torchft.process_group.watchdog import wait_in_stream

if TYPE_CHECKING:
    from torchft.manager.step import Step

__all__ = ["Average", "Done", "Members", "Name", "is_finite"]

Name = str | Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
"""What a tensor is called in an error; or what gives the parts of it, by their names."""

_LOOK_S = 0.05
_LOOKS_WITHOUT_A_MEMBER = 10
"""How many looks, `_LOOK_S` apart, an operation is given to end after a member was lost."""


class Members(Protocol):
    """The members of a process group among whom something is averaged."""

    @property
    def retired(self) -> bool:
        """Whether the group of these members was abandoned."""
        ...

    @property
    def lost(self) -> bool:
        """Whether one of the members has left since."""
        ...


@runtime_checkable
class _HasHalves(Protocol):
    """A collective whose second half begins when somebody asks, such as `OrderedMean`."""

    def advance(self, timeout: timedelta | None = None) -> None: ...


class Average(Work):
    """An all-reduce under way; afterwards `tensor` holds the result, divided by `divisor`."""

    def __init__(
        self,
        step: Step,
        work: Work,
        tensor: torch.Tensor,
        divisor: int,
        members: Members | None = None,
        *,
        sent: torch.Tensor | None = None,
        judged: bool = False,
        name: Name | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        """`timeout`: how long a wait lasts that names no time of its own. `judged`: whether it is
        finite is looked at. With a `name`, the step is discarded when it is not; without one that
        is left to whoever asks `is_finite`."""
        super().__init__()
        self._step = step
        self._work = work
        self._tensor = tensor
        self._sent = tensor if sent is None else sent
        """What is reduced in place, if not the tensor itself."""
        self._divisor = divisor
        self._judged, self._name = judged, name
        self._finite: bool | torch.Tensor = True
        self._once = threading.RLock()
        self._finished = False
        self._members = members
        self._timeout = timeout
        self._lost_looks = 0
        self._future: Future[torch.Tensor] | None = None
        self._answered = False

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait, at most `timeout` or else the manager's, and divide. Returns True; a failure
        discards the step."""
        if not self._finished:
            self._finish(
                self._failure_of(partial(wait_in_stream, self._work), timeout or self._timeout)
            )
        return True

    def is_finite(self) -> bool:
        """Whether the average, which has arrived, was found to be finite; True where nobody looked.
        Waits for the device that it is on."""
        self._finite = bool(self._finite)
        return self._finite

    def report(self) -> None:
        """Discard the step if the average has arrived and is not finite, and has a name to be
        called by."""
        with self._once:
            if self._name is None or self.is_finite() or self._step.failed:
                return
            name, tensor = self._name, self._tensor
            named = {name: tensor} if isinstance(name, str) else name(tensor)
            self._step.report(not_finite(named), local=True)

    def advance(self) -> None:
        """Begin the second half of what has two, when the first has arrived."""
        if isinstance(self._work, _HasHalves) and not self._finished:
            error = self._failure_of(self._work.advance, self._timeout)
            if error is not None:
                self._finish(error)

    def get_future(self) -> Future[torch.Tensor]:
        """Completes by itself with the averaged tensor; after a failure, with it as it is.

        Raises:
            PhaseError: this average is finished by who waits.
        """
        if self._future is None:
            self._future = future_on(self._tensor)
            self._work.get_future().add_done_callback(self._complete)
            if self._members is not None:
                call_after(_LOOK_S, self._look)
        return self._future

    def synchronize(self) -> None:
        """Wait without a deadline, as `wait` does."""
        self.wait()

    def block_current_stream(self) -> None:
        """The same as `wait`: the current stream sees the averaged tensor."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the tensor already holds the result."""
        return self._finished

    def _complete(self, arrived: Future) -> None:
        try:
            arrived.wait()
        except Exception as error:
            self._finish(error)
        else:
            self._finish(None)
        self._answer()

    def _answer(self) -> None:
        with self._once:
            answered, self._answered = self._answered, True
        if not answered:
            assert self._future is not None
            self._future.set_result(self._tensor)

    def _failure_of(
        self, wait: Callable[[timedelta], object], timeout: timedelta | None
    ) -> Exception | None:
        # Who waits may have to start the second half.
        paid = paid_by(self._step.account)
        try:
            with self._step.ledger.spending(Bucket.COMMUNICATE), paid:
                self._await(wait, timeout)
        except Exception as error:
            return error
        return None

    def _await(self, wait: Callable[[timedelta], object], timeout: timedelta | None) -> None:
        until = time.monotonic() + timeout.total_seconds() if timeout else float("inf")
        while True:
            began = time.monotonic()
            patience_s = max(0.001, min(_LOOK_S, until - began))
            try:
                wait(timedelta(seconds=patience_s))
                return
            except Exception as error:
                now = time.monotonic()
                # One that comes before its time is no timeout. Torch counts whole milliseconds.
                if now - began < patience_s - 0.002:
                    raise
                if timeout is not None and now >= until - 0.002:
                    raise CollectiveError(
                        f"no result in {timeout.total_seconds():g} s, the timeout: a member is "
                        "stopped, or slower than that"
                    ) from error
                if self._is_hopeless():
                    raise CollectiveError("a member left in the middle of it") from error

    def _look(self) -> None:
        """Without anybody waiting: see that the future completes."""
        if self._answered:
            return
        if self._finished or self._is_hopeless():
            self._finish(CollectiveError("a member left in the middle of it"))
            self._answer()
        else:
            call_after(_LOOK_S, self._look)

    def _is_hopeless(self) -> bool:
        if self._members is None:
            return False
        self._lost_looks += self._members.lost
        return self._members.retired or self._lost_looks >= _LOOKS_WITHOUT_A_MEMBER

    def _finish(self, error: Exception | None) -> None:
        with self._once:
            if self._finished:
                return
            if error is None and self._sent is not self._tensor:
                self._tensor.copy_(self._sent)
            if error is None:
                self._divide()
            self._finished = True
        # The first error is the cause; those that come of abandoning the rest add nothing.
        step = self._step
        if error is not None and (not step.failed or step.not_finite):
            failed = CollectiveError(
                f"the all-reduce of {tuple(self._tensor.shape)} failed: {_plain(error)}"
            )
            failed.__cause__ = error
            step.report(failed)

    def _divide(self) -> None:
        if self._judged:
            self._finite = divide(self._tensor, self._divisor)
            if isinstance(self._finite, bool):  # else at the vote: nobody waits for a device here
                self.report()
        elif self._divisor != 1:
            self._tensor.div_(self._divisor)


def is_finite(work: Work) -> bool:
    """Whether what was averaged is finite, as far as somebody looked. It has arrived."""
    return not isinstance(work, Average) or work.is_finite()


_SOURCE = re.compile(r"^\[[^\]\s]*:\d+\] ")
_GUESS = " This is typically caused by"


def _plain(error: Exception) -> str:
    """What gloo says, without the place in its sources and its guess at the cause."""
    return _SOURCE.sub("", str(error)).partition(_GUESS)[0]


class Done(Work):
    """A collective that has nothing to do: the tensor stays as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return True, since there is nothing to wait for."""
        return True

    def get_future(self) -> Future[torch.Tensor]:
        """The future, which was complete from the start."""
        future = future_on(self._tensor)
        future.set_result(self._tensor)
        return future

    def synchronize(self) -> None:
        """Do nothing, since there is nothing to wait for."""

    def block_current_stream(self) -> None:
        """Do nothing, since there is nothing to wait for."""

    def is_completed(self) -> bool:
        """True, since it was complete from the start."""
        return True
