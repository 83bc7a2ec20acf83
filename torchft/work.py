"""Works that are no single operation of a backend: one that has ended, and several as one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import Work
from torch.futures import Future, collect_all

__all__ = ["AllOf", "_DummyWork"]


class _DummyWork(Work):
    """Done from the start; its future holds `result`."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result
        self._future: Future[Any] = Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """True at once."""
        return True

    def get_future(self) -> Future[Any]:
        """The completed future."""
        return self._future

    def result(self) -> Any:
        """What the operation returned."""
        return self._result

    def is_completed(self) -> bool:
        """True."""
        return True

    def is_success(self) -> bool:
        """True."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def block_current_stream(self) -> None:
        """Nothing to wait for."""


class AllOf(Work):
    """Several operations as one, which has ended when all of them have."""

    def __init__(self, works: Sequence[Work]) -> None:
        super().__init__()
        self._works = tuple(works)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for all of them, at most `timeout` altogether."""
        until = None if timeout is None else time.monotonic() + timeout.total_seconds()
        for work in self._works:
            if until is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=max(0.001, until - time.monotonic())))
        return True

    def get_future(self) -> Future[Any]:
        """Completes with the futures of all, or with an error of one."""
        return collect_all([work.get_future() for work in self._works])

    def is_completed(self) -> bool:
        """Whether all of them have ended."""
        return all(work.is_completed() for work in self._works)

    def synchronize(self) -> None:
        """Wait without a deadline, as `wait` does."""
        self.wait()
