"""What is seen of a run with a parameter server: the workers' logs, and what the server says.

A worker's log is JSON, a line for each step; `at` is `time.monotonic()`, which all processes of
this machine share.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchft.errors import UnreachableError
from torchft.records import LineFollower

__all__ = ["ServerMonitor", "WorkerMonitor", "WorkerStep"]

ASK_EVERY_S = 0.1
"""How often the server is asked."""


@dataclass(frozen=True)
class WorkerStep:
    """A line of a worker's log."""

    at: float
    step: int
    loss: float
    syncs: int
    """Rounds that it has taken part in."""

    @classmethod
    def of(cls, line: bytes) -> WorkerStep | None:
        """None: the line tells of something else than a step, or its writer was killed in it."""
        try:
            told = json.loads(line)
            syncs = int(told["diloco/sync_count"])
            return cls(float(told["at"]), int(told["step"]), float(told["loss"]), syncs)
        except (ValueError, KeyError):
            return None


class WorkerMonitor:
    """One worker; `log` need not be there yet."""

    def __init__(self, log: Path) -> None:
        self.steps: list[WorkerStep] = []
        self._lines = LineFollower(log)

    def poll(self) -> None:
        """Read what the worker has logged since the last call."""
        self.steps += [
            step for line in self._lines.poll() if (step := WorkerStep.of(line)) is not None
        ]

    @property
    def last(self) -> WorkerStep | None:
        """The newest step that was read, None before the first."""
        return self.steps[-1] if self.steps else None

    def longest_pause(self, since: float, until: float) -> float:
        """Seconds, of those in which it stood between two steps within that time; 0: it had none
        there."""
        moments = [step.at for step in self.steps]
        pairs = pairwise(moments)
        pauses = [after - before for before, after in pairs if after > since and before < until]
        return max(pauses, default=0.0)


class ServerMonitor:
    """`ask` gives `/v1/status`, or raises UnreachableError."""

    def __init__(
        self, ask: Callable[[], dict[str, Any]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.status: dict[str, Any] = {}
        """The newest; empty while there is none."""
        self.version = 0
        """Of the common weights, as last heard."""
        self.bytes_in = self.bytes_out = 0
        """Encoded numbers, over all lives."""
        self.versions: list[tuple[float, int]] = []
        """When each was first heard of."""
        self._ask, self._clock = ask, clock
        self._asked_at = float("-inf")
        self._before = (0, 0)

    def poll(self) -> None:
        """Ask the server for its status, if it is time."""
        now = self._clock()
        if now < self._asked_at + ASK_EVERY_S:
            return
        self._asked_at = now
        try:
            self.status = self._ask()
        except UnreachableError:
            self.status = {}
            return
        came, went = self._before
        self.bytes_in = came + self.status["bytes_in"]
        self.bytes_out = went + self.status["bytes_out"]
        version = min((f["version"] for f in self.status["fragments"]), default=0)
        if version > self.version:
            self.version = version
            self.versions.append((now, version))

    def begin_life(self) -> None:
        """A new process counts its bytes from 0."""
        self._before = (self.bytes_in, self.bytes_out)
        self.status = {}

    def moved_on(self, since: float) -> float | None:
        """When the first version after that moment was heard of."""
        return next((at for at, _ in self.versions if at > since), None)

    @property
    def members(self) -> frozenset[str]:
        """The workers that the server knows of."""
        return frozenset(self.status.get("workers", ()))
