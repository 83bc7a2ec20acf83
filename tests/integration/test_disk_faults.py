"""Whoever writes a checkpoint is killed, or its disk fills, breaks or hangs."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.disks import Disk, with_disk
from helpers.saved import names, newest, save

from torchft.checkpointing import kept
from torchft.errors import CheckpointError


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A folder with one whole checkpoint, of step 5."""
    save(tmp_path / "before", 5)
    return tmp_path / "before"


@pytest.fixture
def again(tmp_path: Path) -> Path:
    """A folder with one of step 10 alone, which is written once more."""
    save(tmp_path / "again", 10)
    return tmp_path / "again"


OLDEST = {"before": 5, "again": 10}
"""What is found by situation till the new one is there."""


def copies(folder: Path) -> Iterator[tuple[int, Path]]:
    """Fresh copies of a folder, numbered from 1 on."""
    for number in itertools.count(1):
        copy = folder.with_name(f"copy {number}")
        shutil.copytree(folder, copy)
        yield number, copy
        shutil.rmtree(copy)


def goes_on(folder: Path) -> None:
    """The next checkpoint is written, and half ones are gone then."""
    save(folder, 15)
    assert names(folder) == [kept.name_of(15)] and newest(folder) == 15


@pytest.mark.parametrize("situation", OLDEST)
def test_a_whole_one_is_found_whenever_the_writer_is_killed(
    situation: str, request: pytest.FixtureRequest
) -> None:
    found = []
    for number, folder in copies(request.getfixturevalue(situation)):
        ended = with_disk(Disk(killed_at=number), lambda folder=folder: save(folder, 10))
        found.append(newest(folder))
        goes_on(folder)
        if ended:
            break
    assert found == sorted(found) and set(found) == {OLDEST[situation], 10}
    assert len(found) > 20


def faulty(name: str, folder: Path) -> list[int]:
    """What is the newest one after a fault at each change of files, till there is none."""
    disk, found = Disk(), []
    disk.attach()
    for number, copy in copies(folder):
        disk.changes = 0
        setattr(disk, name, number)
        try:
            save(copy, 10)
            failed = False
        except (CheckpointError, OSError):
            failed = True
        happened = disk.changes >= number
        setattr(disk, name, None)
        found.append(newest(copy))
        assert failed or found[-1] == 10
        assert not failed or kept.draft_of(10) not in names(copy)
        goes_on(copy)
        if not happened:
            return found
    raise AssertionError


@pytest.mark.parametrize("name", ["full_at", "broken_at"])
@pytest.mark.parametrize("situation", ["before", pytest.param("again", marks=pytest.mark.slow)])
def test_a_disk_that_fills_or_breaks_keeps_the_last_whole_one(
    situation: str, name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(situation)

    def story() -> None:
        found = faulty(name, folder)
        assert set(found) == {OLDEST[situation], 10} and len(found) > 20

    assert with_disk(Disk(), story)
