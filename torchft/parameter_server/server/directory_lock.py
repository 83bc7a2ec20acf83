"""One server to an output folder: a second one would delete what the first is working with."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from torchft.errors import SettingsError

__all__ = ["DirectoryLock"]


class DirectoryLock:
    """On `folder`, until `release` or the end of the process, however that comes.

    Raises:
        SettingsError: another server has it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: int | None = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise SettingsError(
                f"another server works in {folder}: end that one first, or give another -o"
            ) from None

    def release(self) -> None:
        """Give the folder free for another server; harmless to repeat."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
