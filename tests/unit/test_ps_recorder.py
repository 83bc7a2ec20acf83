"""Records of several fragments, written beside each other's outer steps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torchft.parameter_server.core.events import RoundClosed
from torchft.parameter_server.server.state_records import StateRecorder
from torchft.parameter_server.server.work_queue import WorkQueue


class State:
    """Every fragment is at version 1."""

    def published(self, fragment: int) -> Any:
        return SimpleNamespace(version=1)

    def pieces(self, fragment: int) -> list[Any]:
        return []


class Records:
    """A disk on which a record takes a moment, and which gives way when it is asked to."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def write(self, close: RoundClosed, pieces: object, others_wait: Callable[[], bool]) -> bool:
        until = time.monotonic() + 0.01
        while time.monotonic() < until:
            if others_wait():
                return False
        self.written.append(close.fragment)
        return True


def test_records_of_fragments_that_closed_together_do_not_give_way_to_each_other() -> None:
    records = Records()

    async def all_of_them() -> None:
        work_queue = WorkQueue()
        recorder = StateRecorder(records, work_queue, lambda *said: None)  # type: ignore[arg-type]
        rows = [recorder.record(State(), RoundClosed(at, 1, ()), 0.0) for at in range(3)]  # type: ignore[arg-type]
        try:
            await asyncio.wait_for(asyncio.gather(*rows), 10)
        finally:
            work_queue.end()

    asyncio.run(all_of_them())
    assert sorted(records.written) == [0, 1, 2]
