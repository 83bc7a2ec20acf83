"""`diloco` from start to end: real processes, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.coordination import free_port
from helpers.waiting import until

from torchft.cli.diloco import main

DILOCO = [sys.executable, "-m", "torchft.cli.diloco"]
TRAIN = Path(__file__).parents[1] / "helpers" / "ps_train.py"


@contextmanager
def running(*typed: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [*DILOCO, *typed], env={**os.environ, **env}, stdout=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def said(child: subprocess.Popen[str], words: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without saying {words!r}")


class Site:
    """A port, a folder for home, and what `diloco status` says there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.env = {"HOME": str(folder)}
        self.address = f"127.0.0.1:{self.port}"

    def server(self, *more: str) -> Any:
        flags = [
            "-o",
            str(self.folder / "out"),
            "-n",
            "2",
            "--port",
            str(self.port),
            "--grace",
            "3",
        ]
        return running("server", *flags, "--save-every", "3", *more, **self.env)

    def worker(self, name: str, steps: int, seed: int) -> Any:
        return running(
            *("worker", "--server", self.address, "--worker-id", name, "--sync-every", "5"),
            *("--codec", "int8", "--", sys.executable, str(TRAIN), str(steps), str(seed)),
            **self.env,
        )

    def status(self, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
        code = main(["status", "--server", self.address, "--json"])
        text = capsys.readouterr().out
        return json.loads(text) if code == 0 else {}

    def version(self, capsys: pytest.CaptureFixture[str]) -> int:
        fragments = self.status(capsys).get("fragments", [])
        return fragments[0]["version"] if fragments else -1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_is_killed_another_joins_and_the_server_is_killed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("helpers.ps.DEADLINE_S", 180.0)
    site = Site(tmp_path)
    with site.server() as server:
        said(server, "listens on")
        with site.worker("a", 100_000, 1) as a, site.worker("b", 100_000, 2) as b:
            until(lambda: site.version(capsys) >= 4, "both train")
            kill_of(a, TRAIN)
            then = site.version(capsys)
            until(lambda: site.version(capsys) > then + 2, "b goes on without a")
            with site.worker("c", 100_000, 3) as c:
                until(lambda: "c" in site.status(capsys).get("workers", {}), "c joins")
                server.kill()
                server.wait()
                reached = then
                with site.server() as again:
                    said(again, "listens on")
                    assert site.version(capsys) >= reached, "nothing that was counted is lost"
                    now = site.version(capsys)
                    until(lambda: site.version(capsys) > now + 2, "b and c have come back")
                    assert {"b", "c"} <= site.status(capsys)["workers"].keys()
                    for worker in (b, c):
                        worker.send_signal(signal.SIGTERM)
                    assert [worker.wait(60) for worker in (b, c)] == [0, 0]
                    again.send_signal(signal.SIGTERM)
                    assert again.wait(60) == 0


def kill_of(worker: subprocess.Popen[str], script: Path) -> None:
    """Kill the training process itself, without a word; the command says so by its code."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    assert worker.wait(60) == 128 + signal.SIGKILL


# An old failing that must not come back: `status` of a dead server ended with code 0.
def test_the_exit_code_tells_that_there_is_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert main(["status", "--server", f"127.0.0.1:{free_port()}"]) == 1
    assert "no answer from the parameter server" in capsys.readouterr().err
    assert time.monotonic() - began < 60


# An old failing that must not come back: the command's exit code was dropped.
@pytest.mark.parametrize("code", [0, 7])
def test_the_exit_code_is_the_commands(code: int) -> None:
    command = ["worker", "--server", "x:1", "--", sys.executable, "-c", f"raise SystemExit({code})"]
    assert main(command) == code


def test_a_dry_run_shows_what_would_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--server", "gpu:8512", "--no-bf16", "--dylu", "-d", "0,1", "--num-fragments", "4"]
    assert main(["worker", *flags, "--dry-run", "--", "python", "train.py", "--lr", "1"]) == 0
    assert capsys.readouterr().out == (
        "DILOCO_SERVER=gpu:8512 DILOCO_BF16_COMM=0 DILOCO_DYLU=1 DILOCO_NUM_FRAGMENTS=4 "
        "CUDA_VISIBLE_DEVICES=0,1 python train.py --lr 1\n"
    )


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["server", "-n", "2"], "say where to write: -o OUT"),
        (["server", "-o", "x", "-n", "2", "--min-workers", "3"], "no round could close"),
        (["server", "-o", "x", "-n", "2", "--dylu"], "a synchronous round cannot use"),
        (["server", "-o", "x", "-n", "2", "--dn-buffer-size", "4"], "add --async"),
        (["server", "-o", "x", "-n", "2", "--port", "0"], "needs --auth-token-file"),
        (["server", "-o", "x", "-n", "2", "--no-auth", "--tls-cert", "x"], "both --tls-cert"),
        (["server", "-o", "x", "-n", "0"], "must be an integer, at least 1"),
        (["server", "-o", "x"], "-n/--num-workers"),
        (["worker", "--server", "x:1"], "say what to run"),
        (["worker", "--server", "x:1", "--", "no-such-command"], "cannot run no-such-command"),
        ([], "COMMAND"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    capsys: pytest.CaptureFixture[str], typed: list[str], words: str
) -> None:
    try:
        code: object = main(typed)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert words in capsys.readouterr().err


def test_a_flag_of_a_worker_wins_over_the_variables_of_the_same_meaning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DILOCO_SERVER", "gpu:8512")
    monkeypatch.setenv("DILOCO_CODEC", "int8")
    monkeypatch.setenv("DILOCO_AUTH_TOKEN", "another")
    flags = ["--no-bf16", "--auth-token-file", "tokens.json"]
    assert main(["worker", *flags, "--dry-run", "--", "train"]) == 0
    said = capsys.readouterr().out.split()
    assert {"DILOCO_BF16_COMM=0", "DILOCO_CODEC=''", "DILOCO_AUTH_TOKEN=''"} <= set(said)
    monkeypatch.delenv("DILOCO_SERVER")
    assert main(["worker", "--dry-run", "--", "train"]) == 2
    assert "say where the server is" in capsys.readouterr().err
