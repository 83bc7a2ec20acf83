"""The groups of a run begin together: nobody is near its end when the last one arrives.

Every worker says that it is ready, by a file in the run's folder, and waits for the launcher's
word, another file, which comes when all are ready. One that is started again finds it there.
"""

from __future__ import annotations

from pathlib import Path

from torchft.errors import TorchftError
from torchft.retry import wait_until

__all__ = ["StartError", "Starting", "wait_for_start"]

_WORD = "start"


class StartError(TorchftError):
    """The launcher's word did not come."""


def wait_for_start(folder: Path, *, group: int, rank: int, timeout_s: float) -> None:
    """In a worker: say that it is ready, and wait for the word.

    Raises:
        StartError: it did not come within `timeout_s`.
    """
    _ready(folder, group, rank).touch()
    if not wait_until((folder / _WORD).exists, timeout_s):
        raise StartError(
            f"the launcher did not start the run within {timeout_s:g} s: another group has not "
            f"come up; its log is in {folder}"
        )


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
