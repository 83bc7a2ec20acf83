"""Writes state records while the workers train, beside everything that they wait for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from torchft.parameter_server.core.rounds import Close
from torchft.parameter_server.server.jobs import Jobs
from torchft.parameter_server.server.shared import SharedState
from torchft.parameter_server.server.state_records import StateRecords

__all__ = ["Recorder"]

_QUIET = 4.0


class Recorder:
    """Of one event loop."""

    def __init__(self, records: StateRecords, jobs: Jobs, note: Callable[[str, int], None]) -> None:
        self._records, self._jobs, self._note = records, jobs, note
        self._ending = asyncio.Event()
        self._writing = asyncio.Lock()
        """One at a time: two that gave way to each other would do so for ever."""
        self._is_full = False
        """The last record could not be written, and that was said."""

    def end(self) -> None:
        """Wait for no more quiet."""
        self._ending.set()

    async def record(self, state: SharedState, close: Close, step_s: float) -> None:
        """Record what `close` made, unless its next version is made first.

        Begins when four times as long as the step took (`step_s`) has passed, in which workers
        fetch the news, and gives way to all that is to be done in turn. A disk without room costs
        the record, and is said once until one is written again.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), _QUIET * step_s)
        try:
            async with self._writing:
                while state.published(close.fragment).version == close.version:
                    if await self._jobs.in_turn(self._write, state, close):
                        self._is_full = False
                        break
        except OSError as error:
            if not self._is_full and self._jobs.failure is None:
                what = f"the state of fragment {close.fragment}, version {close.version}"
                self._note(f"{what}, was not recorded, the run goes on: {error}", logging.WARNING)
            self._is_full = True

    def _write(self, state: SharedState, close: Close) -> bool:
        if state.published(close.fragment).version != close.version:
            return False  # a step was before it in the queue
        pieces = state.pieces(close.fragment)
        return self._records.write(close, pieces, self._jobs.others_wait)
