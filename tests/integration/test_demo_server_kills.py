"""The demo of the parameter server as people run it: real processes, real kills."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.waiting import until

from torchft.launch.processes import is_dead, kill_all, tree

pytestmark = pytest.mark.timeout(600)

LIGHT = Path(__file__).parents[1] / "helpers" / "ps_demo_train.py"

Demo = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    """Starts demos whose files are in `tmp_path / "run"`, and ends what is left of them."""
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> subprocess.Popen[str]:
        run = [sys.executable, "-m", "torchft.cli.main", "demo-server"]
        command = [*run, f"--keep={tmp_path / 'run'}", *flags]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for command in started:
        kill_all(tree(command.pid))
        command.communicate()


def light() -> str:
    return f"--train={shlex.join([sys.executable, str(LIGHT)])}"


def check(demo: subprocess.Popen[str], timeout_s: float) -> None:
    said, _ = demo.communicate(timeout=timeout_s)
    assert demo.returncode == 0, said
    assert "b is killed: SIGKILL" in said
    assert "c is a member" in said
    assert "the server is killed: SIGKILL" in said
    assert "digests: the survivors' and the server's are equal" in said


# The same story with a worker that needs no transformers, so that it takes a third of the time.
@pytest.mark.parametrize("codec", ["int8", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_worker_dies_another_joins_the_server_dies_and_the_weights_are_equal(
    demo: Demo, codec: str
) -> None:
    check(demo(light(), "--grace=2", f"--codec={codec}"), 500)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_with_trainers_of_transformers(demo: Demo) -> None:
    script = Path(__file__).parents[2] / "examples" / "parameter_server" / "train.py"
    command = shlex.join([sys.executable, str(script), "-t", "demo.yaml", "train"])
    check(demo(f"--train={command}", "--timeout=1200"), 1300)


# An error of ours that must not come back: the demo trained a file that only a checkout has.
@pytest.mark.slow
def test_the_demo_as_it_is_typed_needs_nothing_but_the_package(demo: Demo) -> None:
    check(demo(), 550)


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_demo_that_is_ended_leaves_nothing_behind(
    demo: Demo, tmp_path: Path, number: signal.Signals
) -> None:
    command = demo(light())
    log = tmp_path / "run" / "worker_a" / "log.jsonl"
    until(log.exists, "a trains", within_s=200)
    processes = tree(command.pid)[1:]
    assert len(processes) >= 5, "the server, and two workers with a command each"
    os.kill(command.pid, number)
    code = command.wait(60)
    assert code == (128 + number if number == signal.SIGTERM else -number)
    until(lambda: all(map(is_dead, processes)), "all have ended", within_s=60)


def test_a_worker_that_fails_ends_the_demo_which_says_so(demo: Demo) -> None:
    command = demo("--train=python -c 'raise SystemExit(3)'")
    said, _ = command.communicate(timeout=300)
    assert command.returncode == 1
    assert "given up: a ended with exit code 3" in said or "given up: b ended" in said


def test_a_folder_with_files_is_refused(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").touch()
    command = demo(light())
    command.communicate(timeout=60)
    assert command.returncode == 2
