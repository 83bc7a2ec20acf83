"""Deadlines for operations that a device runs by itself, and the works that stand for these.

Nobody who trains waits for such an operation on the host: `wait` puts what comes next behind it in
the current stream. So nobody would notice one that never ends because a peer died. The watchdog of
a generation has all that were begun, oldest first, and one timer: it looks when the oldest is due
and, unless that has ended, abandons the generation. The streams then go on, the vote finds the
error, and the step is discarded.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import Work
from torch.futures import Future

from torchft.errors import CollectiveError
from torchft.futures import call_after
from torchft.retry import pauses

__all__ = ["DeviceWork", "Watchdog", "wait_in_stream"]

_LOOK_S = (0.0002, 0.01)
"""First and longest pause between two looks of somebody who waits on the host."""


class Watchdog:
    """Calls `expire(reason)` once, when an operation has not ended by its deadline.

    `expire` is a bound method, which is not kept alive from here. `after(seconds, callback)` is
    the timer, `clock` says the time in seconds.
    """

    def __init__(
        self,
        expire: Callable[[str], None],
        *,
        after: Callable[[float, Callable[[], None]], None] = call_after,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expire = weakref.WeakMethod(expire)
        self._after = after
        self._clock = clock
        self._begun: deque[tuple[float, float, Work]] = deque()
        """Deadline, timeout in seconds, work: in the order in which they were begun."""
        self._changing = threading.Lock()
        self._due = float("inf")  # when it looks next

    def watch(self, work: Work, timeout: timedelta) -> None:
        """Give `work`, begun now, that long to end."""
        seconds = timeout.total_seconds()
        deadline = self._clock() + seconds
        with self._changing:
            while self._begun and _has_ended(self._begun[0][2]):
                self._begun.popleft()
            self._begun.append((deadline, seconds, work))
            sooner = deadline < self._due
            self._due = min(deadline, self._due)
        if sooner:
            self._look_after(seconds)

    def _look_after(self, seconds: float) -> None:
        """Look again then. The timer holds no generation that everybody else has let go of."""
        look = weakref.WeakMethod(self._look)
        self._after(seconds, lambda: (look() or _nothing)())

    def _look(self) -> None:
        now = self._clock()
        with self._changing:
            self._begun = deque(one for one in self._begun if not _has_ended(one[2]))
            late = [seconds for deadline, seconds, _ in self._begun if deadline <= now]
            if late:
                self._begun.clear()
            self._due = min((deadline for deadline, _, _ in self._begun), default=float("inf"))
        if late and (expire := self._expire()) is not None:
            expire(f"an operation had no result in {late[0]:g} s, the timeout")
        elif self._begun:
            self._look_after(self._due - now)


def _nothing() -> None:
    """Stands in for a watchdog that is gone."""


def _has_ended(work: Work) -> bool:
    """A failed one has: whoever needs it finds the error."""
    try:
        return work.is_completed()
    except RuntimeError:
        return True


class DeviceWork(Work):
    """An operation that a device runs by itself.

    `wait()` returns at once: the current stream goes on when the operation has ended, and its
    deadline is the watchdog's. `wait(timeout)` waits on the host. `failure()` is the error of the
    process group, None while it has none.
    """

    def __init__(self, work: Work, failure: Callable[[], Exception | None]) -> None:
        super().__init__()
        self._work = work
        self._failure = failure

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait in the current stream; with a `timeout`, on the host.

        Raises:
            CollectiveError: it was abandoned, or has not ended after `timeout`.
        """
        if timeout is not None:
            self.wait_on_host(timeout)
        self.block_current_stream()
        return True

    def wait_on_host(self, timeout: timedelta | None = None) -> None:
        """Wait until the device is done with it, or its deadline has passed.

        Raises:
            CollectiveError: it was abandoned, or has not ended after `timeout`.
        """
        until = float("inf") if timeout is None else time.monotonic() + timeout.total_seconds()
        waits = pauses(*_LOOK_S)
        while not _has_ended(self._work):
            if (error := self._failure()) is not None:
                raise error
            if timeout is not None and time.monotonic() >= until:
                raise CollectiveError(f"no result in {timeout.total_seconds():g} s")
            time.sleep(next(waits))

    def block_current_stream(self) -> None:
        """The current stream goes on when the operation has ended.

        Raises:
            CollectiveError: the process group was abandoned.
        """
        if (error := self._failure()) is not None:
            raise error
        self._work.wait()

    def synchronize(self) -> None:
        """The same as `wait` without a timeout."""
        self.block_current_stream()

    def get_future(self) -> Future[Any]:
        """Torch's own, which orders the streams of its callbacks."""
        return self._work.get_future()

    def is_completed(self) -> bool:
        """Whether the device is done with it."""
        return _has_ended(self._work)

    def result(self) -> Any:
        """The tensors that have the result, or get it."""
        return self._work.result()


def wait_in_stream(work: Work, timeout: timedelta | None) -> None:
    """Have what comes next come after `work`, without holding up the host where a device runs it.

    `timeout` is for those that are waited for on the host. Raises what `work.wait` raises.
    """
    if isinstance(work, DeviceWork):
        work.block_current_stream()
    elif timeout is None:
        work.wait()
    else:
        work.wait(timeout)
