"""One replica group as a child process: it starts, is killed whole, comes back, and is ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.commands import is_there

from torchft.launch.group import Group, GroupError, torchrun
from torchft.launch.processes import born_at, kill_tree, tree

TELL = """
import os
def tell(word):
    with open(os.environ["TOLD"], "w") as told:
        told.write(str(word))
"""
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"],
                         start_new_session=True)
tell(child.pid)
time.sleep(60)
"""
"""A parent and a child in a session of its own, as torchrun makes them."""

MakeGroup = Callable[..., Group]
Told = Callable[[], int]


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "told"
    os.mkfifo(path)
    return path


@pytest.fixture
def told(pipe: Path) -> Iterator[Told]:
    """Waits for the number that the group tells."""
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def number() -> int:
        readable, _, _ = select.select([end], [], [], 20)
        assert readable, "the group has told nothing"
        return int(os.read(end, 100))

    yield number
    os.close(end)


@pytest.fixture
def make_group(tmp_path: Path, pipe: Path) -> Iterator[MakeGroup]:
    made: list[Group] = []

    def make(script: str) -> Group:
        command = [sys.executable, "-S", "-c", TELL + script]
        environment = {**os.environ, "TOLD": str(pipe)}
        made.append(Group(0, command, environment, tmp_path / "group.log"))
        return made[-1]

    yield make
    for group in made:
        group.stop(grace_s=0)


def test_a_kill_takes_the_children_in_other_sessions_too(make_group: MakeGroup, told: Told) -> None:
    group = make_group(FAMILY)
    group.start()
    child = told()
    assert is_there(child)
    life = group.kill()
    assert not is_there(life.pid)
    assert not is_there(child)
    assert life.code == -signal.SIGKILL
    assert life.killed is not None and life.ended is not None
    assert life.spawned < life.killed <= life.ended


def test_a_killed_group_can_start_again(make_group: MakeGroup) -> None:
    group = make_group("import time; time.sleep(60)")
    first = group.start()
    group.kill()
    second = group.start()
    assert group.alive
    assert first.pid != second.pid
    assert group.lives == [first, second]


def test_a_group_that_runs_cannot_start(make_group: MakeGroup) -> None:
    group = make_group("import time; time.sleep(60)")
    group.start()
    with pytest.raises(GroupError, match="already runs as process"):
        group.start()


def test_a_group_that_does_not_run_cannot_be_killed(make_group: MakeGroup) -> None:
    with pytest.raises(GroupError, match="does not run"):
        make_group("pass").kill()


def test_a_group_that_never_started_has_no_life(make_group: MakeGroup) -> None:
    with pytest.raises(GroupError, match="has not been started"):
        _ = make_group("pass").life


def test_stop_is_polite_first(make_group: MakeGroup, told: Told) -> None:
    polite = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); "
    group = make_group(polite + "tell(1); signal.pause()")
    group.start()
    told()
    group.stop(grace_s=20)
    assert group.life.code == 7
    assert group.life.killed is None


def test_stop_ends_who_does_not_listen_and_its_children(make_group: MakeGroup, told: Told) -> None:
    group = make_group("import signal; signal.signal(15, lambda *_: 0)\n" + FAMILY)
    group.start()
    child = told()
    group.stop(grace_s=0.05)
    assert group.life.code == -signal.SIGKILL
    assert not is_there(child)


def test_stop_ends_workers_that_outlive_their_agent(make_group: MakeGroup, told: Told) -> None:
    group = make_group(FAMILY)  # the parent dies of SIGTERM and leaves its child
    group.start()
    child = told()
    group.stop(grace_s=20)
    assert group.life.code == -signal.SIGTERM
    assert not is_there(child)


def test_stop_twice_is_fine(make_group: MakeGroup) -> None:
    group = make_group("import time; time.sleep(60)")
    group.start()
    group.stop(grace_s=0)
    group.stop(grace_s=0)


def test_what_a_group_prints_is_in_its_log(make_group: MakeGroup) -> None:
    group = make_group("print(42)")
    life = group.start()
    os.waitid(os.P_PID, life.pid, os.WEXITED | os.WNOWAIT)
    assert group.log.read_text() == "42\n"


def test_the_tree_of_nobody_is_empty() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    process.wait()
    assert tree(process.pid) == []
    assert kill_tree(process.pid) == []


def test_a_process_is_born_before_now() -> None:
    born = born_at(os.getpid())
    assert born is not None
    assert born < time.monotonic()
    assert born_at(2**30) is None


def test_the_command_line_is_torchruns() -> None:
    command = torchrun(["train.py", "--steps=3"], workers=2)
    assert command[:3] == [sys.executable, "-m", "torchft.launch.agent"]
    assert command[-2:] == ["train.py", "--steps=3"]
    assert "--nproc-per-node=2" in command
