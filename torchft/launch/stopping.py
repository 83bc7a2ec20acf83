"""Being told to stop, as a question that a loop asks: no exception out of nowhere.

    with StopSignals() as stop:
        while not stop.received: ...

A handler that raised could do so between the start of a child and the line that remembers it.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals"]

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Takes SIGINT, SIGTERM and SIGHUP between `with` and its end; on the main thread only."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The number of the first that came."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in NUMBERS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number
