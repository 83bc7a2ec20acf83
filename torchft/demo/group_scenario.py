"""The scenario of the replica groups: one is killed in the middle of the run and comes back.

All groups come up; one of them is killed; when the others have committed a step without it, it is
started again; it heals, and the run ends together. The seed chooses the victim, the step, and how
much later than that step the kill comes, so that it falls anywhere inside a step.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from torchft.demo.scenario import KillProcess, Stage, StartProcess
from torchft.errors import SettingsError

__all__ = ["Scenario", "name_of"]

MIDDLE = (0.3, 0.5)
"""The part of the run, as fractions of its steps, in which the kill begins."""

WITHIN_S = 0.1
"""The kill comes at most this much after its step: a few steps, so any moment of one."""

RESTART_AT_LATEST_S = 10.0
"""A victim is started again by then, even if the others have not gone on."""


def name_of(group: int) -> str:
    """Return what messages and actions call a group."""
    return f"group {group}"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Which group is killed when, and what the demo waits for."""

    victim: int
    at_step: int
    """The clock starts when the victim has committed this step …"""
    after_s: float
    """… and stops this many seconds later."""

    @classmethod
    def from_seed(cls, seed: int, *, groups: int, steps: int) -> Scenario:
        """Choose victim and moment; the same seed gives the same scenario.

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

    @property
    def stages(self) -> list[Stage]:
        """The stages of the scenario, in the order of the controller."""
        name = name_of(self.victim)
        return [
            Stage(
                f"until {name} reaches step {self.at_step}",
                lambda now, _: now.all_took_part and now.steps[name] >= self.at_step,
            ),
            Stage(
                "until the moment of the kill",
                lambda now, began: now.now >= began.now + self.after_s,
                KillProcess(name),
            ),
            Stage(
                "until the others have gone on",
                lambda now, began: now.went_on or now.now >= began.now + RESTART_AT_LATEST_S,
                StartProcess(name),
            ),
        ]
