"""One background thread that never holds up the end of the process.

The interpreter joins the threads of a `ThreadPoolExecutor` before anything else at exit, so Ctrl-C
would wait for a quorum that is still waited for there. A daemon thread is not joined; the call it
waits in returns when the extension ends its runtime.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

__all__ = ["Background"]

P = ParamSpec("P")
T = TypeVar("T")


class Background:
    """Runs calls one after another, in the order they were given."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run `call` when those before it have ended; its result or error is the future's."""
        future: Future[T] = Future()
        self._calls.put((future, lambda: call(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True) -> None:
        """End the thread after the calls that were given; `wait` for that end."""
        self._calls.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while (given := self._calls.get()) is not None:
            future, call = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del future, call, given  # a thread that waits for work keeps nothing of the last alive
