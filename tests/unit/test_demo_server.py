"""The demo of the parameter server without a process: its story, what it sees, what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from torchft.demo.scenario import Controller, EndIn, KillProcess, RunSnapshot, StartProcess
from torchft.demo.server_monitor import ServerMonitor, WorkerMonitor
from torchft.demo.server_scenario import STAGES
from torchft.demo.server_summary import ServerSummary, WorkerResult, held_by_workers
from torchft.errors import SettingsError, UnreachableError

# ---------------------------------------------------------------------- the story


def snapshot(version: int, *members: str, steps: int = 0, syncs: int = 0) -> RunSnapshot:
    everybody = dict.fromkeys("ac", steps)
    return RunSnapshot(
        version=version,
        members=frozenset(members),
        steps=everybody,
        rounds={"a": version, "c": syncs},
    )


def test_the_story_from_start_to_end() -> None:
    controller = Controller(STAGES)
    told = [
        controller.decide(at)
        for at in (
            snapshot(0),
            snapshot(2, "a", "b"),
            snapshot(3, "a", "b"),
            snapshot(4, "a", "b"),
            snapshot(5, "a", "b"),
            snapshot(9, "a", syncs=0),
            snapshot(11, "a", "c", syncs=1),
            snapshot(12, "a", "c", syncs=2, steps=40),
            snapshot(12, steps=44),
            snapshot(12, steps=45),
            snapshot(13, "a", "c"),
            snapshot(14, "a", "c"),
            snapshot(17, "a", "c"),
        )
    ]
    assert [act for act in told if act is not None] == [
        KillProcess("b"),
        StartProcess("c"),
        KillProcess("the server"),
        StartProcess("the server"),
        EndIn(3),
    ]
    assert told.index(KillProcess("b")) == 2
    assert told.index(StartProcess("the server")) == 9
    assert controller.done


def test_nobody_is_killed_before_both_are_members() -> None:
    controller = Controller(STAGES)
    assert controller.decide(snapshot(9, "a")) is None
    assert controller.waits == "until both workers have closed some rounds"


# ---------------------------------------------------------------------- what is seen


def test_a_log_is_read_as_it_grows_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    watch = WorkerMonitor(path)
    watch.poll()
    assert watch.last is None
    lines = [
        {"eval_loss": 5.0, "step": 0, "at": 0.5},
        {"loss": 4.0, "step": 1, "at": 1.0, "diloco/sync_count": 0},
        {"loss": 3.0, "step": 2, "at": 1.5, "diloco/sync_count": 1},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"loss": 2')
    watch.poll()
    assert watch.last is not None
    assert (watch.last.step, watch.last.loss, watch.last.syncs) == (2, 3.0, 1)
    with path.open("a") as file:
        file.write('\n{"loss": 2.0, "step": 4, "at": 6.0, "diloco/sync_count": 1}\n')
    watch.poll()
    assert [step.step for step in watch.steps] == [1, 2, 4]
    assert watch.longest_pause(2.0, 3.0) == 4.5
    assert watch.longest_pause(7.0, 8.0) == 0


def test_bytes_are_counted_over_both_lives_of_the_server() -> None:
    now = 0.0

    def status(version: int, moved: int) -> dict[str, Any]:
        fragments = [{"version": version}]
        return {"bytes_in": moved, "bytes_out": 2 * moved, "fragments": fragments, "workers": {}}

    answers: list[Any] = [status(1, 10), status(2, 20), None, status(2, 0), status(3, 5)]

    def ask() -> dict[str, Any]:
        answer = answers.pop(0)
        if answer is None:
            raise UnreachableError("refused")
        return dict(answer)

    watch = ServerMonitor(ask, lambda: now)
    for life in range(5):
        now += 1.0
        if life == 3:
            watch.begin_life()
        watch.poll()
        watch.poll()  # too soon
        assert bool(watch.status) == (life != 2)
    assert (watch.bytes_in, watch.bytes_out, watch.version) == (25, 50, 3)
    assert watch.moved_on(2.0) == 5.0
    assert watch.moved_on(5.0) is None


# ---------------------------------------------------------------------- what is said


def worker(name: str, **more: Any) -> WorkerResult:
    known = {
        "killed": False,
        "code": 0,
        "steps": 100,
        "rounds": 10,
        "paused_at_kill_s": 3.1,
        "paused_without_server_s": 0.2,
        "held_out": (5.5, 2.5),
        "digest": "d" * 64,
    }
    return WorkerResult(name=name, **{**known, **more})


GOOD = ServerSummary(
    workers=[
        worker("a"),
        worker("b", killed=True, code=-9, digest=None, held_out=None),
        worker("c"),
    ],
    told=True,
    rounds=17,
    rounds_at_kill=12,
    rounds_after_restart=12,
    bytes_in=2_000_000,
    bytes_out=3_000_000,
    away_s=4.2,
    server_code=0,
    server_digest="d" * 64,
    wall_s=60.0,
    trouble=None,
    stopped_by=None,
    folder=Path("run"),
)


def test_a_good_run_says_what_happened() -> None:
    assert GOOD.good
    assert GOOD.text().splitlines() == [
        "",
        "17 rounds in 60.0 s; 5.0 MB moved: 2.0 to the server, 3.0 from it",
        "  a: 100 steps, 10 rounds, exit code 0; held-out loss 5.500 → 2.500",
        "     longest time between two steps: 3.10 s at b's kill, 0.20 s at the server's",
        "  b: 100 steps, 10 rounds, killed",
        "  c: 100 steps, 10 rounds, exit code 0; held-out loss 5.500 → 2.500",
        "     longest time between two steps: 3.10 s at b's kill, 0.20 s at the server's",
        "  the server was killed after round 12, and back with round 12 after 4.2 s",
        "digests: the survivors' and the server's are equal, dddddddddddddddd",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": [worker("a"), worker("c", digest="e" * 64)]}, "digests: NOT EQUAL: a dddd"),
        ({"workers": [worker("a"), worker("c", digest=None)]}, "c none"),
        ({"server_digest": None}, "server none"),
        ({"server_digest": "e" * 64}, "server eeee"),
        ({"workers": [worker("a"), worker("c", code=1)]}, "c: 100 steps, 10 rounds, exit code 1"),
        ({"server_code": 1}, "logs: run"),
        ({"told": False}, "not all that was to happen has happened"),
        ({"trouble": "not over after 5 s"}, "given up: not over after 5 s"),
        ({"rounds_after_restart": 11}, "back with round 11"),
        ({"away_s": None, "told": False}, "the server did not come back"),
    ],
)
def test_a_run_that_is_not_good_says_why(change: dict[str, Any], words: str) -> None:
    summary = dataclasses.replace(GOOD, **change)
    assert not summary.good
    assert words in summary.text()


def test_a_server_that_saved_nothing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="left no checkpoint"):
        held_by_workers(tmp_path)
