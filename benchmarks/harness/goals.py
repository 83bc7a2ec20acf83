"""What the figures are held to. A goal that is missed is shown and never makes a run fail: wall
times depend on the machine and on who else uses it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from harness.figures import Figure

__all__ = ["GOALS", "Goal", "Verdict", "judge"]


class Verdict(enum.Enum):
    """A figure beside its goal."""

    MET = "met"
    MISSED = "missed"
    NONE = ""
    """There is no goal for it."""


@dataclass(frozen=True)
class Goal:
    """At most `at_most`: of the floor when `ratio`, else of the figure in its own unit."""

    at_most: float
    ratio: bool = True

    def met_by(self, figure: Figure) -> bool:
        """Whether `figure` keeps to it."""
        reached = figure.ratio if self.ratio else figure.value
        return reached is not None and reached <= self.at_most


GOALS = {
    # startup
    "startup.import": Goal(1.15),
    "startup.heavy_modules": Goal(0, ratio=False),
    "startup.lighthouse_cpu": Goal(0.15, ratio=False),  # seconds
    "startup.lighthouse_memory": Goal(40, ratio=False),  # MiB
    # quorum_latency
    "quorum.lighthouse_cpu.512": Goal(70, ratio=False),  # milliseconds
    # commit_latency
    "commit.step": Goal(3),
    "commit.heartbeat": Goal(0.2, ratio=False),  # milliseconds
    # allreduce_overhead
    "allreduce.4096": Goal(1.3),
    "allreduce.1048576": Goal(1.15),
    "allreduce.67108864": Goal(1.03),
    # recovery_time
    "recovery.next_commit": Goal(1.1),
    "recovery.digests_that_differ": Goal(0, ratio=False),
}
"""By `Figure.key`."""


def judge(figure: Figure) -> Verdict:
    """Whether a figure keeps to its goal."""
    goal = GOALS.get(figure.key)
    if goal is None:
        return Verdict.NONE
    return Verdict.MET if goal.met_by(figure) else Verdict.MISSED
