"""Where retired process groups go to die."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest

from torchft.process_group import reaper


class Retired:
    """Stands in for a process group: something that says when it has been dropped."""

    def __init__(self) -> None:
        self.dropped = threading.Event()
        weakref.finalize(self, self.dropped.set)


@pytest.mark.parametrize("moment", ["__init__", "start"])
def test_a_garbage_collection_buries_a_group_while_the_reaper_starts(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    dropped = []
    original = getattr(threading.Thread, moment)

    def bury_one() -> None:
        group = Retired()
        dropped.append(group.dropped)
        given: list[object] = [group]
        del group
        fresh.bury(given)

    def collects(thread: threading.Thread, *args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        bury_one()
        original(thread, *args, **kwargs)

    monkeypatch.setattr(threading.Thread, moment, collects)
    fresh = reaper._Reaper()
    bury_one()
    assert len(dropped) == 2
    assert all(event.wait(timeout=10) for event in dropped)
    fresh.end()
