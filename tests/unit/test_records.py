"""Step records survive kills, restarts and readers that come too early."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.records import step_record

from torchft.records import (
    RecordsError,
    StepRecord,
    StepRecords,
    StepRecordsReader,
    read_step_records,
)


def record(step: int, **fields: object) -> StepRecord:
    members = ("group_0:abc", "group_1:def")
    known = {"t_monotonic": 1.5, "quorum_id": 7, "replica_id": members[0], "members": members}
    return step_record(step, **{**known, **fields})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "steps.jsonl"


def test_a_record_reads_back_as_it_was_written(path: Path) -> None:
    written = record(
        3,
        committed=False,
        why="group_1 was lost",
        bytes_sent=12,
        seconds={"quorum": 0.25},
        ledger={"start": 2.0},
        extra={"loss": 7.5},
    )
    with StepRecords(path) as records:
        records.append(written)
    assert read_step_records(path) == [written]


def test_a_record_is_on_disk_before_close(path: Path) -> None:
    StepRecords(path).append(record(0))
    assert [r.step for r in read_step_records(path)] == [0]


def test_a_torn_last_line_is_passed_over(path: Path) -> None:
    with StepRecords(path) as records:
        records.append(record(0))
        records.append(record(1))
    path.write_bytes(path.read_bytes()[:-9])
    assert [r.step for r in read_step_records(path)] == [0]


def test_a_restarted_writer_does_not_glue_its_record_to_a_torn_line(path: Path) -> None:
    with StepRecords(path) as records:
        records.append(record(0))
    path.write_bytes(path.read_bytes()[:-9])
    with StepRecords(path) as records:
        records.append(record(1))
    reader = StepRecordsReader(path)
    assert ([r.step for r in reader.poll()], reader.torn) == ([1], 1)


def test_a_reader_follows_and_waits_for_the_end_of_a_line(path: Path) -> None:
    reader = StepRecordsReader(path)
    assert reader.poll() == []
    with StepRecords(path) as records:
        records.append(record(0))
        assert [r.step for r in reader.poll()] == [0]
    with open(path, "ab") as file:
        line = record(1).to_json().encode() + b"\n"
        file.write(line[:40])
        file.flush()
        assert reader.poll() == []
        file.write(line[40:])
    assert [r.step for r in reader.poll()] == [1]


def test_json_that_is_no_record_names_file_and_line(path: Path) -> None:
    with StepRecords(path) as records:
        records.append(record(0))
    with open(path, "a") as file:
        file.write('{"step": 1}\n')
    with pytest.raises(RecordsError, match=r"steps\.jsonl:2 .*missing"):
        read_step_records(path)


def test_extra_that_json_cannot_hold_is_an_error_and_writes_nothing(path: Path) -> None:
    with StepRecords(path) as records, pytest.raises(TypeError):
        records.append(record(0, extra={"loss": object()}))
    assert path.read_bytes() == b""


def test_reading_an_absent_file_is_an_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_step_records(path)
