"""Something that may hang inside torch, done on a thread of its own so that the caller never does.

A TCPStore whose process was stopped, or whose host went off the net, answers no operation and keeps
none of its timeouts; gloo tries a dead peer for five times its own. The caller waits for the
deadline or until it is stopped, and then leaves the thread behind: it ends with the connection that
it hangs in, and what it still brings is discarded.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

from torchft.errors import CollectiveError, MeetingTimeoutError

__all__ = ["Attempt", "Deadline"]

T = TypeVar("T")

_EXIT_S = 0.5
"""How long an exit waits for what is stopped: a thread that comes back from torch into an
interpreter that is being taken down ends the process with SIGABRT."""

_GRACE_S = 0.25
"""So long beyond the deadline, or a stop, may the thread itself say what was missing."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment by which something must have happened."""

    timeout: timedelta
    at: float
    """Seconds of `time.monotonic()`."""

    @staticmethod
    def after(timeout: timedelta) -> Deadline:
        """The deadline that lies `timeout` from now."""
        return Deadline(timeout, time.monotonic() + timeout.total_seconds())

    def left(self) -> timedelta:
        """Never negative, and never zero, which some of torch's calls take for "no deadline"."""
        return timedelta(seconds=max(0.001, self.at - time.monotonic()))

    def passed(self) -> bool:
        """Whether the moment has been reached or passed."""
        return time.monotonic() >= self.at

    def __str__(self) -> str:
        return f"{self.timeout.total_seconds():g} s"


class Attempt(Generic[T]):
    """`do(attempt)`, begun at once. It should set `stage` as it goes on, and look at `stopped`."""

    def __init__(
        self, do: Callable[[Attempt[T]], T], *, discard: Callable[[T], None] | None = None
    ) -> None:
        self.stage = "to begin"
        """What is waited for, for the error: "the store at …"."""
        self.stopped = threading.Event()
        self._woken = threading.Event()  # it has ended, or it is stopped
        self._changing = threading.Lock()
        self._outcome: list[T] | BaseException | None = None
        self._left = False
        self._discard = discard
        self._thread = threading.Thread(
            target=self._run, args=(do,), name="torchft-attempt", daemon=True
        )
        _running.add(self)
        self._thread.start()

    def stop(self) -> None:
        """Give up, whatever it waits for."""
        self.stopped.set()
        self._woken.set()

    def wait(self, deadline: Deadline) -> T:
        """What `do` returns.

        Raises:
            MeetingTimeoutError: if it has not ended at `deadline`.
            CollectiveError: if it was stopped, and does not say why.
            Exception: what `do` raises.
        """
        try:
            woken = self._woken.wait(deadline.left().total_seconds() + _GRACE_S)
            if woken and self._outcome is None:  # stopped, not ended
                self._let_it_say_why()
        finally:
            with self._changing:
                outcome, self._outcome, self._left = self._outcome, None, True
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is None and self.stopped.is_set():
                raise CollectiveError(f"abandoned while waiting for {self.stage}")
            if outcome is None:
                raise MeetingTimeoutError(f"waited {deadline} for {self.stage}")
            return outcome[0]
        finally:
            # An error's stack holds this frame, which would hold the error: then only the garbage
            # collector could free what is in those frames, a whole process group.
            del outcome

    def _let_it_say_why(self) -> None:
        self._woken.clear()
        if self._outcome is None:
            self._woken.wait(_GRACE_S)

    def _run(self, do: Callable[[Attempt[T]], T]) -> None:
        outcome: list[T] | BaseException
        try:
            outcome = [do(self)]
        except BaseException as error:
            outcome = error
        with self._changing:
            late = self._left
            if not late:
                self._outcome = outcome
        self._woken.set()
        _running.discard(self)
        if late and isinstance(outcome, list) and self._discard is not None:
            self._discard(outcome[0])


_running: weakref.WeakSet[Attempt[Any]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    attempts = list(_running)
    for attempt in attempts:
        attempt.stop()
    until = time.monotonic() + _EXIT_S
    for attempt in attempts:
        attempt._thread.join(max(0.0, until - time.monotonic()))


if hasattr(os, "register_at_fork"):  # in a forked child none of the threads exists
    os.register_at_fork(after_in_child=_running.clear)
