"""Deadlines for things that have none of their own: a future, a block of code.

One timer thread serves the process, started by the first deadline; it holds a heap of what is due
and sleeps until the earliest. A deadline that is met in time costs its timer one cancelled entry.
Callbacks run on that thread, so they must be short: set an event, abort a process group.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.futures import Future

from torchft.errors import MissingDeviceError

__all__ = [
    "call_after",
    "context_timeout",
    "future_on",
    "future_timeout",
    "future_wait",
    "stream_timeout",
]

T = TypeVar("T")


class _Entry:
    """One deadline. A cancelled entry stays in the heap until its time and then does nothing."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def fire(self) -> None:
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()


class _Timer:
    """A thread that calls back when a deadline has passed."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._order = itertools.count()  # equal deadlines fire in the order they were set
        self._heap: list[tuple[float, int, _Entry]] = []
        self._pid = 0  # threads do not survive a fork: the child starts its own
        self._thread: threading.Thread | None = None
        self._ended = False

    def after(self, timeout: timedelta, callback: Callable[[], None]) -> _Entry:
        entry = _Entry(callback)
        due = time.monotonic() + timeout.total_seconds()
        with self._changed:
            self._start()
            heapq.heappush(self._heap, (due, next(self._order), entry))
            if self._heap[0][2] is entry:
                self._changed.notify()
        return entry

    def _start(self) -> None:
        if self._pid != os.getpid() and not self._ended:
            self._pid = os.getpid()
            self._thread = threading.Thread(target=self._run, name="torchft-timer", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            entry.fire()
            del entry  # what it holds must not outlive it here, asleep until the next one

    def end(self, timeout_s: float = 1.0) -> None:
        """At the end of the process: no deadline fires any more, and what they hold is freed here.

        A thread that frees a torch object while Python shuts down is ended in its destructor, which
        aborts the process.
        """
        with self._changed:
            self._ended = True
            self._heap.clear()
            self._changed.notify()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join(timeout_s)

    def _next(self) -> _Entry | None:
        with self._changed:
            while True:
                if self._ended:
                    return None
                if not self._heap:
                    self._changed.wait()
                elif (left := self._heap[0][0] - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    return heapq.heappop(self._heap)[2]

    def forget(self) -> None:
        """In a forked child: the parent's deadlines are the parent's."""
        self.__init__()  # type: ignore[misc]


_timer = _Timer()
atexit.register(lambda: _timer.end())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_timer.forget)


def call_after(seconds: float, callback: Callable[[], None]) -> None:
    """Call back once, on the timer's thread, after that time."""
    _timer.after(timedelta(seconds=seconds), callback)


def future_on(tensor: Tensor) -> Future[Tensor]:
    """A future for `tensor`, which orders streams where that lies on a GPU."""
    return Future() if tensor.device.type == "cpu" else Future(devices=[tensor.device])


def future_timeout(fut: Future[T], timeout: timedelta) -> Future[T]:
    """A future with the result of `fut`, or with a TimeoutError once `timeout` has passed.

    `fut` itself goes on; whatever it writes to may still be written after the deadline.
    """
    limited: Future[T] = Future()
    once = threading.Lock()  # held for ever by whichever comes first

    def late() -> None:
        if once.acquire(blocking=False):
            limited.set_exception(_late(timeout))  # type: ignore[arg-type]

    entry = _timer.after(timeout, late)

    def arrived(done: Future[T]) -> None:
        if not once.acquire(blocking=False):
            return
        entry.cancel()
        try:
            limited.set_result(done.value())
        except Exception as error:
            limited.set_exception(error)  # type: ignore[arg-type]

    fut.add_done_callback(arrived)
    return limited


def future_wait(fut: Future[T], timeout: timedelta) -> T:
    """Wait for `fut` and return its result.

    Raises:
        TimeoutError: not there after `timeout`.
        Exception: the future's own error.
    """
    event = threading.Event()
    fut.add_done_callback(lambda _: event.set())
    if not event.wait(timeout.total_seconds()):
        raise _late(timeout)
    return fut.value()


@contextmanager
def context_timeout(callback: Callable[[], Any], timeout: timedelta) -> Generator[None, None, None]:
    """Call `callback` once, on the timer's thread, if the block runs longer than `timeout`."""
    entry = _timer.after(timeout, callback)
    try:
        yield
    finally:
        entry.cancel()


def stream_timeout(callback: Callable[[], Any], timeout: timedelta) -> None:
    """Call `callback` once, on the timer's thread, unless the accelerator has done in time all that
    is queued in its current stream now.

    Raises:
        MissingDeviceError: this process has no accelerator.
    """
    if not torch.accelerator.is_available():
        raise MissingDeviceError("no accelerator: on the CPU use context_timeout")
    done = torch.accelerator.current_stream().record_event()
    _timer.after(timeout, lambda: None if done.query() else callback())


def _late(timeout: timedelta) -> TimeoutError:
    return TimeoutError(f"future did not complete within {timeout.total_seconds():g} s")
