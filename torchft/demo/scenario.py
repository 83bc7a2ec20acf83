"""What a demo run does and when: a pure decision from a seed and the reports of the groups.

All groups come up; in the middle part of the run one of them is killed; when the others have
committed a step without it, it is started again; it heals, and the run ends together. The seed
chooses the victim, the step, and how much later than that step the kill comes, so that it falls
anywhere inside a step.

    scenario = Scenario.from_seed(seed=7, groups=3, steps=200)
    controller = Controller(scenario)
    act = controller.decide(snapshot)        # → Kill(group=1), then Restart(group=1), else None
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

from torchft.errors import SettingsError

__all__ = ["Act", "Controller", "Kill", "Restart", "Scenario", "Snapshot", "Stage"]

MIDDLE = (0.3, 0.5)
"""The part of the run, as fractions of its steps, in which the kill begins."""

WITHIN_S = 0.1
"""The kill comes at most this much after its step: a few steps, so any moment of one."""

RESTART_AT_LATEST_S = 10.0
"""A victim is started again by then, even if the others have not gone on."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Who is killed, and when."""

    victim: int
    at_step: int
    """The clock starts when the victim has committed this step …"""
    after_s: float
    """… and stops this many seconds later."""

    @classmethod
    def from_seed(cls, seed: int, *, groups: int, steps: int) -> Scenario:
        """The same seed gives the same scenario.

        Raises:
            SettingsError: too few groups to lose one, or steps to have a middle part.
        """
        if groups < 2:
            raise SettingsError(
                f"{groups} group cannot lose one and go on: give --replicas 2 or more"
            )
        if steps < 4:
            raise SettingsError(f"a run of {steps} steps has no middle: give --steps 4 or more")
        dice = random.Random(seed)
        first, last = (int(part * steps) for part in MIDDLE)
        return cls(
            victim=dice.randrange(groups),
            at_step=dice.randint(max(1, first), max(1, last)),
            after_s=dice.uniform(0, WITHIN_S),
        )


class Stage(enum.Enum):
    """Where in the scenario the run is."""

    BEGINNING = "until the victim reaches its step"
    AIMED = "until the moment of the kill"
    DOWN = "until the others have gone on"
    RETURNING = "until the end"


@dataclass(frozen=True)
class Kill:
    """SIGKILL this group's whole process tree now."""

    group: int


@dataclass(frozen=True)
class Restart:
    """Start this group again."""

    group: int


Act = Kill | Restart


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is known of the run at one moment."""

    now: float
    """`time.monotonic()`, seconds."""
    victim_step: int
    """Steps that the victim has committed."""
    all_took_part: bool
    """Whether there has been a step with every group in it."""
    went_on: bool
    """Whether the others have committed a step without the victim since the kill."""


class Controller:
    """Follows a scenario; None as a scenario is a run without a kill."""

    def __init__(self, scenario: Scenario | None) -> None:
        self.scenario = scenario
        self.stage = Stage.BEGINNING
        self._mark = 0.0
        """When this part began."""

    def decide(self, snapshot: Snapshot) -> Act | None:
        """What to do now, if anything. Each act is told once."""
        if self.scenario is None:
            return None
        if self.stage is Stage.BEGINNING and self._is_reached(snapshot):
            self._turn_to(Stage.AIMED, snapshot.now)
        if self.stage is Stage.AIMED and snapshot.now >= self._mark + self.scenario.after_s:
            self._turn_to(Stage.DOWN, snapshot.now)
            return Kill(self.scenario.victim)
        late = snapshot.now >= self._mark + RESTART_AT_LATEST_S
        if self.stage is Stage.DOWN and (snapshot.went_on or late):
            self._turn_to(Stage.RETURNING, snapshot.now)
            return Restart(self.scenario.victim)
        return None

    def _is_reached(self, snapshot: Snapshot) -> bool:
        assert self.scenario is not None
        return snapshot.all_took_part and snapshot.victim_step >= self.scenario.at_step

    def _turn_to(self, stage: Stage, now: float) -> None:
        self.stage = stage
        self._mark = now
