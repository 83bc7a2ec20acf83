"""What happens in a demo and when: a pure decision from what is seen of the run.

A scenario is a sequence of stages. Each lasts until its condition holds and may end with an action,
which the controller returns once.

    controller = Controller(stages)
    action = controller.decide(snapshot)        # → KillProcess("group 1"), …, or None
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field

__all__ = ["Action", "Controller", "EndIn", "KillProcess", "RunSnapshot", "Stage", "StartProcess"]


@dataclass(frozen=True)
class KillProcess:
    """Send SIGKILL to this process and everything below it, now."""

    process: str


@dataclass(frozen=True)
class StartProcess:
    """Start this process, for the first time or again."""

    process: str


@dataclass(frozen=True)
class EndIn:
    """Tell the workers to end when this many more rounds have closed."""

    rounds: int


Action = KillProcess | StartProcess | EndIn


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
    """What is known of a run at one moment; each demo fills in what its stages ask for."""

    now: float = 0.0
    """`time.monotonic()`, seconds."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """Process → steps that it has committed (a group) or taken (a worker)."""
    all_took_part: bool = False
    """Whether there has been a step with every group in it."""
    went_on: bool = False
    """Whether the other groups have committed a step without the victim since the kill."""
    version: int = 0
    """Rounds that the parameter server has closed, as last heard."""
    members: Set[str] = frozenset()
    """Workers that the parameter server knows."""
    rounds: Mapping[str, int] = field(default_factory=dict)
    """Worker → rounds that it has taken part in."""


@dataclass(frozen=True)
class Stage:
    """One stage of a scenario, with what ends it."""

    waits: str
    """What it waits for, in words that follow "it waited"."""
    is_over: Callable[[RunSnapshot, RunSnapshot], bool]
    """Asked with what is seen now, and what was seen when the stage began."""
    action: Action | None = None
    """What to do when the stage is over."""


class Controller:
    """Goes through the stages of a scenario, forward only; without stages nothing happens."""

    def __init__(self, stages: Sequence[Stage] = ()) -> None:
        self._left = list(stages)
        self._began: RunSnapshot | None = None
        """What was seen when the present stage began; None: the first one has not begun."""

    @property
    def done(self) -> bool:
        """Whether every stage of the scenario is over."""
        return not self._left

    @property
    def waits(self) -> str:
        """What the present stage waits for, in words."""
        return self._left[0].waits if self._left else "until all have ended"

    def decide(self, snapshot: RunSnapshot) -> Action | None:
        """Return what to do now, or None. Each action is returned once."""
        self._began = self._began or snapshot
        while self._left and self._left[0].is_over(snapshot, self._began):
            over, self._began = self._left.pop(0), snapshot
            if over.action is not None:
                return over.action
        return None
