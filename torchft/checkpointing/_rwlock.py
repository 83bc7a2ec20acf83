"""Many readers or one writer: guards state that checkpoints read and optimizer steps write.

Readers come first: as long as one reads, others may join it and a writer waits. The lock belongs
to no thread, so what one thread acquires another may release.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["RWLock"]


class RWLock:
    """A readers-writer lock whose waits end after `timeout` seconds; a negative one never ends."""

    def __init__(self, timeout: float = -1) -> None:
        self.timeout = timeout
        # Both fields are guarded by the condition, which every release notifies.
        self._changed = threading.Condition()
        self._readers = 0
        self._writing = False

    def r_acquire(self, timeout: float | None = None) -> None:
        """Begin to read. Raises TimeoutError when a writer keeps it for longer than `timeout`."""
        with self._changed:
            self._wait_until(lambda: not self._writing, "read", timeout)
            self._readers += 1

    def r_release(self) -> None:
        """Stop reading. Raises RuntimeError when nobody reads."""
        with self._changed:
            if self._readers == 0:
                raise RuntimeError("r_release without r_acquire")
            self._readers -= 1
            self._changed.notify_all()

    def w_acquire(self, timeout: float | None = None) -> None:
        """Begin to write. Raises TimeoutError when others keep it for longer than `timeout`."""
        with self._changed:
            self._wait_until(lambda: not self._writing and not self._readers, "write", timeout)
            self._writing = True

    def w_release(self) -> None:
        """Stop writing. Raises RuntimeError when nobody writes."""
        with self._changed:
            if not self._writing:
                raise RuntimeError("w_release without w_acquire")
            self._writing = False
            self._changed.notify_all()

    def w_locked(self) -> bool:
        """Whether a writer holds the lock now."""
        return self._writing

    @contextmanager
    def r_lock(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the lock for reading inside a `with` block."""
        self.r_acquire(timeout)
        try:
            yield
        finally:
            self.r_release()

    @contextmanager
    def w_lock(self, timeout: float | None = None) -> Iterator[None]:
        """Hold the lock for writing inside a `with` block."""
        self.w_acquire(timeout)
        try:
            yield
        finally:
            self.w_release()

    def _wait_until(self, free: Callable[[], bool], what: str, timeout: float | None) -> None:
        seconds = self.timeout if timeout is None else timeout
        if not self._changed.wait_for(free, None if seconds < 0 else seconds):
            held = "a writer" if self._writing else f"{self._readers} readers"
            raise TimeoutError(f"could not {what} within {seconds} s: {held} held the lock")
