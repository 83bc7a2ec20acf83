"""Files of numbers that are written, read, and soon not needed: their room is used again.

A system that gives fresh pages to a new file takes longer for it than for copying the numbers, here
2 GB/s against 10 into pages that the file has already. So a file that is done with becomes the next
one. Whoever creates one writes all of it, in whatever was there before.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["FilePool"]


class FilePool:
    """The retired files of one folder, of which at most `keep` are kept. For any thread."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._free: list[Path] = []
        self._named = 0
        self._reading: Counter[Path] = Counter()
        self._lock = threading.Lock()

    def create(self, path: Path) -> Path:
        """Put a retired file at `path`, if there is one, and return `path`.

        Raises:
            OSError: it cannot be moved.
        """
        with self._lock:
            old = self._free.pop() if self._free else None
        return path if old is None else old.replace(path)

    @contextmanager
    def reading(self, path: Path) -> Iterator[Path]:
        """Keep a file as it is within the block, also when it is retired meanwhile."""
        with self._lock:
            self._reading[path] += 1
        try:
            yield path
        finally:
            with self._lock:
                self._reading[path] -= 1
                if not self._reading[path]:
                    del self._reading[path]

    def is_free(self, path: Path) -> bool:
        """Whether a file waits to be used again."""
        with self._lock:
            return path in self._free

    def retire(self, path: Path) -> None:
        """Keep a file for `create`, or delete it: nobody will ask for it any more."""
        with self._lock:
            keep = len(self._free) < self._keep and path not in self._reading and path.exists()
            if not keep:
                path.unlink(missing_ok=True)
                return
            self._named += 1
            self._free.append(path.replace(self._folder / f"free-{self._named}"))
