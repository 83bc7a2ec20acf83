"""The words for what a group does now."""

from __future__ import annotations

from pathlib import Path

from helpers.records import step_record

from torchft.demo.group_run import row_of, state_of
from torchft.launch.group import Group, Life
from torchft.launch.monitor import GroupMonitor
from torchft.records import StepRecord

NOW = 1000.0


def watch(*records: StepRecord) -> GroupMonitor:
    made = GroupMonitor(0, Path("absent"), born_at=lambda _: 1.0)
    for one in records:
        made.add(one)
    return made


def record(t: float, step: int, *, of: str = "group_0:a") -> StepRecord:
    only = {"replica_id": of, "members": (of,), "participants": 1}
    return step_record(step, t_monotonic=t, extra={"loss": 2.0}, **only)


class Running(Group):
    """A group whose process is as told, without a process."""

    code: int | None = None

    def poll(self) -> int | None:
        return self.code


def group(*, spawned: float = NOW - 100, code: int | None = None) -> Group:
    made = Running(0, ["true"], {}, Path("log"), [Life(0, spawned=spawned, code=code)])
    made.code = code
    return made


def test_before_its_first_step_a_group_starts() -> None:
    assert state_of(group(), watch(), NOW) == "starting: torchrun"


def test_after_a_restart_it_starts_again() -> None:
    assert state_of(group(spawned=NOW - 5), watch(record(NOW - 50, 7)), NOW) == "starting: torchrun"


def test_a_group_that_began_at_step_0_trains() -> None:
    assert state_of(group(), watch(record(NOW, 0)), NOW) == "training"


def test_a_group_that_came_back_has_healed_for_a_moment() -> None:
    before = record(NOW - 50, 7)
    assert state_of(group(), watch(before, record(NOW, 30, of="group_0:b")), NOW) == "healed"
    assert state_of(group(), watch(before, record(NOW - 9, 30, of="group_0:b")), NOW) == "training"


def test_a_killed_group_is_dead_and_a_good_one_has_ended() -> None:
    assert state_of(group(code=-9), watch(record(NOW, 7)), NOW) == "dead"
    assert state_of(group(code=0), watch(record(NOW, 7)), NOW) == "ended"


def test_a_row_counts_the_committed_step() -> None:
    seen = watch(record(NOW, 7))
    assert row_of("training", seen) == ["0", "training", "8", "2.000", "1", "1", "0"]


def test_a_group_that_died_before_its_first_step_has_an_empty_row() -> None:
    assert row_of("dead", watch()) == ["0", "dead", "0", "-", "0", "0", "0"]
