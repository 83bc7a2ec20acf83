"""Writes state records while the workers train, beside everything that they wait for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from torchft.parameter_server.core.rounds import RoundClosed
from torchft.parameter_server.server.state_records import StateRecords
from torchft.parameter_server.server.weights import ServerWeights
from torchft.parameter_server.server.work_queue import WorkQueue

__all__ = ["StateRecorder"]

_QUIET = 4.0


class StateRecorder:
    """Of one event loop."""

    def __init__(
        self, records: StateRecords, work_queue: WorkQueue, note: Callable[[str, int], None]
    ) -> None:
        self._records, self._work, self._note = records, work_queue, note
        self._ending = asyncio.Event()
        self._writing = asyncio.Lock()
        """One at a time: two that gave way to each other would do so for ever."""
        self._is_full = False
        """The last record could not be written, and that was said."""

    def end(self) -> None:
        """Wait for no more quiet."""
        self._ending.set()

    async def record(self, state: ServerWeights, close: RoundClosed, step_s: float) -> None:
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
                    if await self._work.in_turn(self._write, state, close):
                        self._is_full = False
                        break
        except OSError as error:
            if not self._is_full and self._work.failure is None:
                what = f"the state of fragment {close.fragment}, version {close.version}"
                self._note(f"{what}, was not recorded, the run goes on: {error}", logging.WARNING)
            self._is_full = True

    def _write(self, state: ServerWeights, close: RoundClosed) -> bool:
        if state.published(close.fragment).version != close.version:
            return False  # a step was before it in the queue
        pieces = state.pieces(close.fragment)
        return self._records.write(close, pieces, self._work.others_wait)
