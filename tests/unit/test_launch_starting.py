"""Groups of a run that begin together."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from torchft.launch.starting import StartError, Starting, wait_for_start


def test_the_word_comes_when_every_worker_is_ready(tmp_path: Path) -> None:
    starting = Starting(tmp_path, groups=2, workers=1)
    ended: list[int] = []

    def worker(group: int) -> None:
        wait_for_start(tmp_path, group=group, rank=0, timeout_s=30.0)
        ended.append(group)

    first = threading.Thread(target=worker, args=(0,))
    first.start()
    assert not starting.look() and not ended
    second = threading.Thread(target=worker, args=(1,))
    second.start()
    while not starting.done:
        starting.look()
    for thread in (first, second):
        thread.join(30.0)
    assert sorted(ended) == [0, 1]
    assert not starting.look(), "it is given once"


def test_a_group_that_is_started_again_waits_for_nobody(tmp_path: Path) -> None:
    starting = Starting(tmp_path, groups=1, workers=1)
    (tmp_path / "group_0.rank_0.ready").touch()
    assert starting.look()
    wait_for_start(tmp_path, group=0, rank=0, timeout_s=0.0)


def test_without_the_word_it_ends_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="another group has not come up; its log is in"):
        wait_for_start(tmp_path, group=0, rank=0, timeout_s=0.0)
