"""What is said at the end of a run, and when a run was good."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from torchft.demo.final_report import FinalReport
from torchft.demo.summary import GroupResult, KillResult, Summary
from torchft.launch.accounts import TimeAccount


def final_report(group: int, *, rank: int = 0, digest: str = "d" * 64) -> FinalReport:
    return FinalReport(
        group=group,
        group_rank=rank,
        pid=7,
        step=200,
        digest=digest,
        held_out_loss=2.5,
        t_monotonic=9.0,
        ledger={},
    )


def group(number: int, **fields: object) -> GroupResult:
    result = GroupResult(
        number=number,
        codes=[0],
        committed=200,
        discarded=[],
        bytes_sent=3 << 20,
        endings=[final_report(number)],
        account=TimeAccount(wall_s=20.0, seconds={"compute": 19.8, "other": 0.2}),
    )
    return dataclasses.replace(result, **fields)  # type: ignore[arg-type]


def run(*groups: GroupResult, **fields: object) -> Summary:
    summary = Summary(groups=groups, workers=1, seed=4, strategy="ddp", wall_s=21.5, kill=None)
    return dataclasses.replace(summary, **fields)  # type: ignore[arg-type]


def test_equal_digests_are_a_good_run() -> None:
    summary = run(group(0), group(1))
    assert summary.good
    assert "digests: equal in all groups, dddddddd" in summary.text()
    assert summary.text().lstrip().startswith("ddp, 2 groups, seed 4: 200 steps in 21.5 s")


def test_different_digests_are_not() -> None:
    summary = run(group(0), group(1, endings=[final_report(1, digest="e" * 64)]))
    assert not summary.good
    assert "NOT EQUAL" in summary.text()
    assert "group 1: rank 0 eeeeeeeeeeeeeeee; exit codes 0" in summary.text()


def test_a_group_that_tells_no_digest_is_not_a_good_run() -> None:
    summary = run(group(0), group(1, endings=[], codes=[-9, 1]))
    assert not summary.good
    assert "INCOMPLETE" in summary.text()
    assert "group 1: none; exit codes -9, 1" in summary.text()


def test_every_rank_must_tell_its_digest() -> None:
    both = [final_report(0), final_report(0, rank=1)]
    assert run(group(0, endings=both), workers=2).good
    assert not run(group(0), workers=2).good


def test_a_group_that_was_killed_and_ended_well_counts_as_well() -> None:
    assert run(group(0, codes=[-9, 0]), group(1)).good


def test_an_exit_code_at_the_end_is_a_bad_run() -> None:
    assert not run(group(0, codes=[1]), group(1)).good


def test_a_run_that_was_given_up_says_why() -> None:
    summary = run(group(0, endings=[]), trouble="group 0 ended with exit code 1")
    assert not summary.good
    assert "given up: group 0 ended with exit code 1" in summary.text()


def test_a_run_that_is_stopped_before_any_group_is_up_ends_with_one_line() -> None:
    nothing = {"codes": [143], "committed": 0, "endings": []}
    stopped = run(
        *(group(number, **nothing) for number in range(3)),
        trouble="stopped by SIGINT",
        stopped_by=2,
        folder=Path("/tmp/run"),
    )
    assert stopped.text() == "stopped by SIGINT before any group was up; logs: /tmp/run"


def test_a_run_that_is_stopped_later_tells_how_far_it_came() -> None:
    early = group(0, endings=[], discarded=["error"], committed=0)
    stopped = run(early, trouble="stopped by SIGINT", stopped_by=2)
    assert "given up: stopped by SIGINT" in stopped.text()


def test_the_kill_is_told_in_seconds() -> None:
    kill = KillResult(group=1, step=80, next_commit_s=1.534, full_again_s=None)
    text = run(group(0), group(1), kill=kill).text()
    assert "group 1 was killed after its step 80" in text
    assert "next commit: 1.53, to full membership: never" in text


def test_the_table_names_the_used_buckets_and_ends_with_the_wall_time() -> None:
    text = run(group(0), group(1)).text()
    assert [line.split() for line in text.splitlines() if line.startswith("  compute")] == [
        ["compute", "19.80", "19.80"]
    ]
    assert "  quorum" not in text
    assert ["wall", "time", "20.00", "20.00"] in [line.split() for line in text.splitlines()]
    assert ["other,", "share", "1.00%", "1.00%"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("seconds", "remark"),
    [
        ({"compute": 19.0, "other": 1.0}, "group 0: 5.0% of its time has no name"),
        ({"compute": 19.0}, "group 0: the buckets miss its wall time by +1.00 s"),
    ],
)
def test_time_without_a_name_is_remarked_on(seconds: dict[str, float], remark: str) -> None:
    odd = run(group(0, account=TimeAccount(wall_s=20.0, seconds=seconds)))
    assert odd.good
    assert remark in odd.text()


def test_discarded_steps_are_told_with_their_reason() -> None:
    text = run(group(0, discarded=["error: connection reset"])).text()
    assert "200 committed, 1 discarded" in text
    assert "discarded: error: connection reset" in text
