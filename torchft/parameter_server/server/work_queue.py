"""What takes long, beside the event loop: work in threads, and tasks that nobody waits for.

Work that has an order (outer steps, checkpoints, updates) shares one thread, which does it in the
order in which it was asked for. What has none has threads of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["WorkQueue"]

T = TypeVar("T")


class WorkQueue:
    """The work of one event loop; all but the work itself runs on it."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        """The first one of a task that nobody waits for."""
        self._ordered = ThreadPoolExecutor(1, "outer-step")
        self._unordered = ThreadPoolExecutor(2, "upload")
        self._tasks: set[asyncio.Future[None]] = set()
        self._turns: set[asyncio.Future[Any]] = set()

    def in_turn(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Do `work` after all that was asked for in turn before."""
        turn = asyncio.get_running_loop().run_in_executor(self._ordered, work, *args)
        self._turns.add(turn)
        turn.add_done_callback(self._turns.discard)
        return turn

    def others_wait(self) -> bool:
        """Whether something waits for the work that is being done in turn. For every thread."""
        return len(self._turns) > 1

    def beside(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Do `work` as soon as a thread is free, whatever was asked for before."""
        return asyncio.get_running_loop().run_in_executor(self._unordered, work, *args)

    def start(self, task: Awaitable[None]) -> None:
        """Run a task that nobody waits for; its first error becomes `failure`."""
        started = asyncio.ensure_future(task)
        self._tasks.add(started)
        started.add_done_callback(self._done)

    async def finish(self) -> None:
        """Wait until all tasks that were started are over."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def end(self) -> None:
        """End the threads, after the work that they have."""
        self._ordered.shutdown()
        self._unordered.shutdown()

    def _done(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        self.failure = self.failure or error
