"""From what a run left to its results."""

from __future__ import annotations

from pathlib import Path

from helpers.records import step_record

from torchft.demo.final_report import FinalReport, read_final_reports
from torchft.demo.options import DemoOptions
from torchft.demo.outcome import group_result, kill_result
from torchft.launch.group import Group, Life
from torchft.launch.monitor import GroupMonitor, RunMonitor
from torchft.records import StepRecord


def record(t: float, step: int, *members: str, of: str = "group_0:a") -> StepRecord:
    who = {"replica_id": of, "members": members, "participants": len(members)}
    return step_record(step, t_monotonic=t, ledger={"compute": t - 1.0}, **who)


def watch(number: int, *records: StepRecord) -> GroupMonitor:
    made = GroupMonitor(number, Path("absent"), born_at=lambda _: 1.0)
    for one in records:
        made.add(one)
    return made


def group(number: int, *lives: Life) -> Group:
    return Group(number, ["true"], {}, Path("log"), list(lives))


def final_report(**fields: object) -> FinalReport:
    values: dict[str, object] = {
        "group": 0,
        "group_rank": 0,
        "pid": 1,
        "step": 3,
        "digest": "d",
        "held_out_loss": 2.0,
        "t_monotonic": 6.0,
        "ledger": {"compute": 4.5, "settle": 0.5},
    }
    return FinalReport(**{**values, **fields})  # type: ignore[arg-type]


def test_a_last_word_is_later_than_the_last_record() -> None:
    one = group(0, Life(1, spawned=0.5, ended=7.0, code=0))
    result = group_result(one, watch(0, record(5.0, 2, "group_0:a")), [final_report()])
    assert result.account.seconds == {"launch": 0.5, "compute": 4.5, "settle": 0.5, "exit": 1.0}
    assert result.account.adds_up


def test_a_group_that_never_started_has_spent_nothing() -> None:
    result = group_result(group(0), watch(0), [])
    assert (result.committed, result.account.wall_s) == (0, 0.0)


def test_the_kill_is_timed_from_the_others() -> None:
    killed = Life(1, spawned=0.0, killed=5.0, ended=5.1, code=-9)
    victim = watch(1, record(4.0, 6, "group_0:a", "group_1:b", of="group_1:b"))
    survivor = watch(
        0,
        record(4.0, 6, "group_0:a", "group_1:b"),
        record(6.5, 7, "group_0:a"),
        record(9.0, 8, "group_0:a", "group_1:c"),
    )
    result = kill_result(group(1, killed), RunMonitor([survivor, victim]), "group_1:b")
    assert result is not None
    assert (result.step, result.next_commit_s, result.full_again_s) == (7, 1.5, 4.0)


def test_without_a_kill_there_is_nothing_to_tell() -> None:
    alive = group(0, Life(1, spawned=0.0, ended=7.0, code=0))
    assert kill_result(alive, RunMonitor([watch(0)]), "") is None


def test_last_words_are_read_by_group_and_rank(tmp_path: Path) -> None:
    said = [final_report(group=1), final_report(group_rank=1), final_report()]
    for one in said:
        one.write(tmp_path)
    assert read_final_reports(tmp_path) == [said[2], said[1], said[0]]


def test_a_later_life_replaces_the_last_word_of_an_earlier(tmp_path: Path) -> None:
    final_report(digest="old").write(tmp_path)
    final_report(digest="new").write(tmp_path)
    assert [one.digest for one in read_final_reports(tmp_path)] == ["new"]


def test_options_survive_the_command_line_of_a_worker(tmp_path: Path) -> None:
    options = DemoOptions(
        replicas=4,
        strategy="diloco",
        codec="int8",
        steps=40,
        seed=9,
        keep=tmp_path,
        corpus=(Path("a b.txt"), Path("--odd")),
    )
    assert DemoOptions.from_json(options.to_json()) == options
    assert DemoOptions.from_json(DemoOptions().to_json()) == DemoOptions()
