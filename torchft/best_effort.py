"""What is written beside a run and is never worth one: records, figures, logs.

    write = BestEffort("the step record", _log.warning)
    write(lambda: records.append(record))     # a full disk: said once, and the run goes on

What is tried again each time may work again, which is said once too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["BestEffort"]

_NEVER = (NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)
"""Of a path that cannot be written at all, which a person finds out best at the start."""


class BestEffort:
    """Calls that may fail by the system's errors: a full disk, a quota, a lost connection.

    Args:
        what: is written, for people: "the step record".
        say: takes a line of log and its values, such as `logger.warning`.
    """

    def __init__(self, what: str, say: Callable[..., Any]) -> None:
        self.lost = 0
        """Calls in a row that failed."""
        self._what = what
        self._say = say

    def first(self, write: Callable[[], Any]) -> bool:
        """As `last`, at the start of a run: a path that can never be written is raised.

        Raises:
            NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError: by `write`.
        """
        return self._attempt(write, raised=_NEVER)

    def __call__(self, write: Callable[[], Any]) -> bool:
        """Call it. False when it failed by an OSError; any other error is raised as it is."""
        lost = self.lost
        written = self._attempt(write)
        if written and lost:
            self._say("%s is written again; lost meanwhile: %d", self._what, lost)
            self.lost = 0
        return written

    def last(self, write: Callable[[], Any]) -> bool:
        """As a call, at the end of a run: success says nothing of what was lost before."""
        return self._attempt(write)

    def _attempt(self, write: Callable[[], Any], raised: tuple[type[OSError], ...] = ()) -> bool:
        try:
            write()
        except OSError as error:
            if isinstance(error, raised):
                raise
            self.lost += 1
            if self.lost == 1:
                self._say("%s is not written, and the run goes on: %s", self._what, error)
            return False
        return True
