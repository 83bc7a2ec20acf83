"""Lines about a run, each told once."""

from __future__ import annotations

from helpers.records import step_record

from torchft.launch.events import Events, short
from torchft.records import StepRecord


def record(step: int, *, of: str = "group_0:a", quorum: int = 5, **fields: object) -> StepRecord:
    return step_record(step, replica_id=of, quorum_id=quorum, **fields)


def told(*records: StepRecord, target: int = 100) -> list[str]:
    return list(Events(2, target=target).of(records))


def test_a_quorum_is_told_once_whoever_reports_it() -> None:
    assert told(record(0), record(0, of="group_1:b"), record(1)) == [
        "step 0: a quorum of group_0, group_1",
        "step 0: all 2 groups take part",
    ]


def test_a_late_report_of_an_old_quorum_is_no_news() -> None:
    news = told(record(8, quorum=6), record(7, quorum=5))
    assert [line for line in news if "a quorum of" in line] == [
        "step 8: a quorum of group_0, group_1"
    ]


def test_members_that_are_not_counted_heal() -> None:
    (first, *_) = told(record(4, participants=1))
    assert first == "step 4: a quorum of group_0, group_1; 1 of them heals"


def test_a_new_process_at_a_later_step_has_healed() -> None:
    healed = record(40, of="group_1:c", seconds={"heal": 0.25})
    assert "group_1 has healed to step 40 in 0.25 s" in told(healed)
    assert not any("healed" in line for line in told(record(0, of="group_1:b")))


def test_a_discarded_step_tells_why() -> None:
    news = told(record(3, committed=False, why="error: the peer is gone"))
    assert "group_0 discards step 3: error: the peer is gone" in news


def test_full_membership_is_told_each_time_it_comes_back() -> None:
    news = told(record(0), record(1, participants=1), record(2))
    assert [line for line in news if "take part" in line] == [
        "step 0: all 2 groups take part",
        "step 2: all 2 groups take part",
    ]


def test_a_run_that_goes_on_past_its_last_step_says_why_and_only_once() -> None:
    early, last, later = record(18, participants=1), record(19, participants=1), record(20)
    news = told(early, last, record(20, participants=1), later, target=20)
    assert [line for line in news if "goes on" in line] == [
        "step 20 is done, and 1 of 2 groups not back yet: goes on until all take part, "
        "to end together"
    ]


def test_a_run_that_ends_on_time_or_discards_its_last_step_does_not_go_on_yet() -> None:
    news = told(record(19), record(19, participants=1, committed=False), target=20)
    assert not any("goes on" in line for line in news)


def test_a_page_of_reason_is_cut_to_a_line() -> None:
    assert short("a\n  b") == "a b"
    assert short("x" * 500, limit=10) == "x" * 9 + "…"
