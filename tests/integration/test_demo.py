"""The demo as people run it: real torchrun agents, real kills, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.waiting import until

from torchft.launch.processes import is_dead, kill_all, tree
from torchft.records import read_step_records

pytestmark = pytest.mark.timeout(400)

Command = subprocess.Popen[str]
Demo = Callable[..., Command]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    """Starts demos that keep their logs in `tmp_path / "run"`, and ends what is left of them."""
    started: list[Command] = []

    def start(*flags: str) -> Command:
        command = [sys.executable, "-m", "torchft.cli.main", "demo", f"--keep={tmp_path / 'run'}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen([*command, *flags], env=environment, stdout=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for command in started:
        kill_all(tree(command.pid))
        command.communicate()


def descendants(command: Command) -> list[Any]:
    return tree(command.pid)[1:]


def workers(command: Command) -> list[Any]:
    """Those that train; their agents are their parents."""
    return [p for p in descendants(command) if p.parent().pid != command.pid]


def said_all(command: Command) -> str:
    said, _ = command.communicate(timeout=350)
    return said


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="as they are"),
        pytest.param(("--codec=int8",), id="int8", marks=pytest.mark.slow),
    ],
)
def test_a_group_is_killed_and_heals_and_all_end_alike(demo: Demo, more: tuple[str, ...]) -> None:
    command = demo("--replicas=2", "--steps=40", "--seed=3", *more)
    said = said_all(command)
    assert command.returncode == 0, said
    assert "is killed: SIGKILL to its 2 processes" in said
    assert "has healed to step" in said
    assert "digests: equal in all groups" in said
    assert "has no name" not in said, "every second is in a bucket with a name"
    assert "miss its wall time" not in said


def test_a_group_is_killed_while_averages_are_in_flight_and_all_end_alike(demo: Demo) -> None:
    command = demo("--replicas=2", "--steps=40", "--seed=3", "--strategy=streaming")
    said = said_all(command)
    assert command.returncode == 0, said
    assert "has healed to step" in said
    assert "digests: equal in all groups" in said
    assert "miss its wall time" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_told_to_stop_leaves_nothing_behind(
    demo: Demo, number: signal.Signals
) -> None:
    command = demo("--replicas=2")
    until(lambda: len(descendants(command)) >= 2, "the groups start", within_s=60)
    processes = descendants(command)
    command.send_signal(number)
    said = said_all(command)
    assert command.returncode == 128 + number
    assert said.splitlines()[-1].startswith(f"stopped by {number.name} before any group was up")
    assert [process for process in processes if not is_dead(process)] == []


def test_a_demo_that_is_killed_leaves_nothing_behind(demo: Demo, tmp_path: Path) -> None:
    command = demo("--replicas=1", "--no-kill", "--steps=100000")
    records = tmp_path / "run" / "group_0.records.jsonl"
    until(records.exists, "the group trains", within_s=120)
    processes = descendants(command)
    assert len(processes) == 2
    command.kill()
    until(lambda: all(map(is_dead, processes)), "agent and worker end", within_s=20)


def test_a_worker_whose_agent_is_killed_ends_within_a_second(demo: Demo, tmp_path: Path) -> None:
    command = demo("--replicas=1", "--no-kill", "--steps=100000")
    records = tmp_path / "run" / "group_0.records.jsonl"
    until(records.exists, "the group trains", within_s=120)
    (worker,) = workers(command)
    worker.parent().kill()
    until(lambda: is_dead(worker), "a second, and the time to look", within_s=1.5)


def test_a_killed_rank_takes_its_group_down_and_it_comes_back_whole(
    demo: Demo, tmp_path: Path
) -> None:
    command = demo("--replicas=2", "--workers-per-replica=2", "--no-kill", "--steps=150")
    records = tmp_path / "run" / "group_1.records.jsonl"

    def pids() -> list[int]:
        written = read_step_records(records) if records.exists() else []
        return [r.extra["pid"] for r in written if r.group_rank == 1]

    until(lambda: bool(pids()), "rank 1 trains", within_s=200)
    os.kill(pids()[0], signal.SIGKILL)
    said = said_all(command)
    assert command.returncode == 0, said
    lives = {record.replica_id for record in read_step_records(records)}
    assert len(lives) == 2, "torchrun restarted the group's workers, both of them"
    assert "digests: equal in all groups" in said


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_seeds_end_alike_and_some_step_is_discarded(demo: Demo, tmp_path: Path) -> None:
    discarded = 0
    for seed in range(20):
        strategy = ("ddp", "local_sgd", "diloco", "streaming")[seed % 4]
        folder = tmp_path / f"seed_{seed}"
        command = demo(f"--seed={seed}", f"--strategy={strategy}", f"--keep={folder}")
        said = said_all(command)
        assert command.returncode == 0, said
        for records in folder.glob("*.records.jsonl"):
            discarded += sum(not record.committed for record in read_step_records(records))
    assert discarded > 0
