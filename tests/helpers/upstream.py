"""Wheels of PyTorch's torchft, each in a virtual environment of its own, and groups that train in
them: the other side in the tests of the wire."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = [
    "OURS",
    "REPOSITORY",
    "WHEELS",
    "CannotFetch",
    "TrainingGroup",
    "fetched",
    "python_of",
    "site_of",
    "their_lighthouse",
]

REPOSITORY = Path(__file__).parents[2]
OURS = "ours"
WHEELS = ("torchft==0.2.0", "torchft-nightly==2026.10.26")
TELEMETRY = ("opentelemetry-api", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")
"""What they import beside torch, which they share with us."""
FETCH_LIMIT_S = 600.0
LIMIT_S = 300.0
"""How long a test waits for one event; each process imports torch, on a machine that is busy."""
LIGHTHOUSE = """
import time
from torchft.coordination import LighthouseServer
server = LighthouseServer(bind="[::]:0", min_replicas=2, join_timeout_ms=5000)
print("http://127.0.0.1:" + server.address().rsplit(":", 1)[1], flush=True)
time.sleep(3600)
"""


class CannotFetch(Exception):
    """A package is not here and cannot be fetched; says why."""


def python_of(what: str) -> list[str]:
    """The interpreter that imports the wheel `what`, or ours. Skips the test where it cannot be
    fetched."""
    if what == OURS:
        return [sys.executable]
    try:
        return [str(_environment(what) / "bin" / "python")]
    except CannotFetch as error:
        pytest.skip(str(error))


def site_of(wheel: str) -> Path:
    """The folder that the wheel is unpacked in. Raises CannotFetch."""
    (site,) = _environment(wheel).glob("lib/python*/site-packages")
    return site


def fetched(packages: tuple[str, ...], folder: Path) -> Path:
    """`folder`, with the packages in it and without what they depend on. Raises CannotFetch."""
    if not folder.exists():
        new = folder.with_name(f"{folder.name}.new")
        install = ["pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
        _uv([*install, "--target", new, *packages])
        new.rename(folder)
    return folder


def _environment(wheel: str) -> Path:
    folder = REPOSITORY / f".venv-{wheel}"
    if not folder.exists():
        new = folder.with_name(f"{folder.name}.new")
        install = ["pip", "install", "--quiet", "--python", new]
        _uv(["venv", "--quiet", "--clear", "--python", sys.executable, new])
        _uv([*install, "--no-deps", "--prerelease", "allow", wheel])
        _uv([*install, *TELEMETRY])
        (site,) = new.glob("lib/python*/site-packages")
        (site / "torch_of_the_tests.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        new.rename(folder)
    return folder


def _uv(arguments: list[Any]) -> None:
    uv = os.environ.get("UV") or shutil.which("uv") or REPOSITORY / ".uv" / "bin" / "uv"
    try:
        subprocess.run(
            [uv, *arguments], check=True, capture_output=True, text=True, timeout=FETCH_LIMIT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        raise CannotFetch(f"{arguments[-1]} cannot be fetched: {said}") from error


class TrainingGroup:
    """A replica group of one process, `any_torchft.py`, whose news are read as they come."""

    def __init__(
        self, what: str, lighthouse: str, name: str, *, steps: int = 10**6, stop: Path | None = None
    ) -> None:
        self.name, self._stop = name, stop
        script = Path(__file__).with_name("any_torchft.py")
        arguments = [script, lighthouse, name, str(steps), "2", *([stop] if stop else [])]
        self.news: list[dict[str, Any]] = []
        self._err: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._process = subprocess.Popen(
            [*python_of(what), "-u", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY) if what == OURS else ""},
        )
        for read in (self._read, self._keep):
            threading.Thread(target=read, daemon=True).start()

    def commits(self, step: int, *, together: int = 1) -> None:
        """Wait until it has committed `step`, or a later one, with so many groups."""
        while not any(n.get("step", -1) >= step and n["with"] >= together for n in self.news):
            self._next()

    def goes_on(self, steps: int, *, together: int = 1) -> None:
        """Wait until it has committed `steps` more than it has told of, with so many groups."""
        self._drain()
        self.commits(self.step + steps, together=together)

    def ends(self) -> dict[str, Any]:
        """How it ended."""
        while not (self.news and "ended" in self.news[-1]):
            self._next()
        return self.news[-1]

    def stops(self) -> None:
        """Have it end after a step that it has voted on, and wait for that."""
        assert self._stop is not None
        self._stop.touch()
        assert self.ends()["ended"] == "done", self.news[-1]
        self._process.wait(LIMIT_S)

    def dies(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def step(self) -> int:
        return max((n["step"] for n in self.news if "step" in n), default=0)

    @property
    def discarded(self) -> int:
        """How many steps it has told of that were not committed."""
        self._drain()
        return sum(not n["committed"] for n in self.news if "step" in n)

    def started(self) -> None:
        while not self.news:
            self._next()

    def _next(self) -> None:
        try:
            self.news.append(json.loads(self._lines.get(timeout=LIMIT_S)))
        except queue.Empty:
            tail = "".join(self._err[-20:])
            raise AssertionError(
                f"{self.name} said nothing after {self.news[-3:]}; {tail}"
            ) from None

    def _drain(self) -> None:
        while not self._lines.empty():
            self._next()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def _keep(self) -> None:
        assert self._process.stderr is not None
        self._err.extend(self._process.stderr)


@contextmanager
def their_lighthouse(wheel: str) -> Iterator[str]:
    """The address of a lighthouse out of a wheel, for at least two groups."""
    child = subprocess.Popen(
        [*python_of(wheel), "-u", "-c", LIGHTHOUSE],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": "", "RUST_LOG": "error"},
    )
    try:
        assert child.stdout is not None
        yield child.stdout.readline().strip()
    finally:
        child.kill()
        child.wait()
