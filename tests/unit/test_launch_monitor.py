"""Step records of several groups, read while they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.records import step_record

from torchft.launch.monitor import GroupMonitor, RunMonitor, group_of
from torchft.records import StepRecord, StepRecords


def record(t: float, step: int, *, life: str = "group_0:a", **fields: object) -> StepRecord:
    values: dict[str, object] = {
        "bytes_sent": 100,
        "ledger": {"compute": t - 1.0},
        "extra": {"pid": 77, "loss": 5.0 - step},
    }
    return step_record(step, t_monotonic=t, replica_id=life, **{**values, **fields})


def watch_of(path: Path, *records: StepRecord, number: int = 0) -> GroupMonitor:
    with StepRecords(path) as file:
        for one in records:
            file.append(one)
    watch = GroupMonitor(number, path, born_at={77: 1.25}.get)
    watch.poll()
    return watch


def test_before_the_first_record_nothing_is_known(tmp_path: Path) -> None:
    watch = GroupMonitor(0, tmp_path / "absent")
    assert watch.poll() == []
    assert (watch.last, watch.step, watch.loss, watch.committed) == (None, 0, None, 0)


def test_rank_0_speaks_for_the_group_and_all_ranks_send_bytes(tmp_path: Path) -> None:
    watch = watch_of(tmp_path / "r", record(2.0, 0), record(2.1, 0, group_rank=1))
    assert len(watch.records) == 1
    assert watch.bytes_sent == 200


def test_a_discarded_step_does_not_advance(tmp_path: Path) -> None:
    late = record(3.0, 1, committed=False, why="an error")
    watch = watch_of(tmp_path / "r", record(2.0, 0), late)
    assert (watch.step, watch.committed, watch.discarded) == (1, 1, [late])


def test_a_worker_was_born_when_the_launcher_says(tmp_path: Path) -> None:
    (trace,) = watch_of(tmp_path / "r", record(2.0, 0), record(3.0, 1)).workers(0.0, 10.0)
    assert trace.born == 1.25
    assert (trace.last_word, trace.ledger) == (3.0, {"compute": 2.0})


def test_a_process_that_is_gone_is_believed(tmp_path: Path) -> None:
    (trace,) = watch_of(tmp_path / "r", record(2.0, 0, extra={"pid": 1})).workers(0.0, 10.0)
    assert trace.born == pytest.approx(1.0)


def test_each_life_has_its_workers(tmp_path: Path) -> None:
    watch = watch_of(tmp_path / "r", record(2.0, 0), record(9.0, 7, life="group_0:b"))
    assert [trace.last_word for trace in watch.workers(0.0, 5.0)] == [2.0]
    assert [trace.last_word for trace in watch.workers(5.0, 10.0)] == [9.0]
    assert list(watch.first_of) == ["group_0:a", "group_0:b"]


def test_when_the_others_go_on_and_when_all_are_back(tmp_path: Path) -> None:
    killed = "group_1:b"
    both = (
        record(2.0, 0),
        record(4.0, 1, committed=False),  # the step in which it was killed
        record(6.0, 1, members=("group_0:a",), participants=1),
        record(8.0, 2, members=("group_0:a", "group_1:c"), participants=1),  # it heals
        record(9.0, 3, members=("group_0:a", "group_1:c"), participants=2),
    )
    watch = RunMonitor([watch_of(tmp_path / "r", *both), GroupMonitor(1, tmp_path / "absent")])
    assert watch.first_full() == 2.0
    assert watch.first_without(killed, 3.0) == 6.0
    assert watch.first_full(3.0) == 9.0
    assert watch.first_full(10.0) is None


def test_a_group_is_named_before_the_colon() -> None:
    assert group_of("group_3:8f0e") == "group_3"
