"""The groups of a run begin together: nobody is near its end when the last one arrives.

Every worker says that it is ready, by a file in the run's folder, and waits for the launcher's
word, another file, which comes when all are ready. One that is started again finds it there.
"""

from __future__ import annotations

import time
from pathlib import Path

from torchft.errors import TorchftError

__all__ = ["StartError", "Starting", "wait_for_start"]

_WORD = "start"
_LOOK_EVERY_S = 0.01


class StartError(TorchftError):
    """The launcher's word did not come."""


def wait_for_start(folder: Path, *, group: int, rank: int, timeout_s: float) -> None:
    """In a worker: say that it is ready, and wait for the word.

    Raises:
        StartError: it did not come within `timeout_s`.
    """
    _ready(folder, group, rank).touch()
    until = time.monotonic() + timeout_s
    while not (folder / _WORD).exists():
        if time.monotonic() > until:
            raise StartError(
                f"the launcher did not start the run within {timeout_s:g} s: another group has not "
                f"come up; its log is in {folder}"
            )
        time.sleep(_LOOK_EVERY_S)


class Starting:
    """In the launcher: gives the word when all workers of all groups are ready."""

    def __init__(self, folder: Path, *, groups: int, workers: int) -> None:
        self._word = folder / _WORD
        self._missing = [_ready(folder, g, r) for g in range(groups) for r in range(workers)]
        self.done = False

    def look(self) -> bool:
        """Whether the word is given just now."""
        self._missing = [path for path in self._missing if not path.exists()]
        if self._missing or self.done:
            return False
        self._word.touch()
        self.done = True
        return True


def _ready(folder: Path, group: int, rank: int) -> Path:
    return folder / f"group_{group}.rank_{rank}.ready"
