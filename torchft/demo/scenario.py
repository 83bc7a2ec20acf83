"""What a demo run does and when: a pure decision from a seed and the reports of the groups.

All groups come up; in the middle part of the run one of them is killed; when the others have
committed a step without it, it is started again; it heals, and the run ends together. The seed
chooses the victim, the step, and how much later than that step the kill comes, so that it falls
anywhere inside a step.

    story = Story.from_seed(seed=7, groups=3, steps=200)
    director = Director(story)
    act = director.decide(scene)        # → Kill(group=1), then Restart(group=1), else None
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

from torchft.errors import SettingsError

__all__ = ["Act", "Director", "Kill", "Part", "Restart", "Scene", "Story"]

MIDDLE = (0.3, 0.5)
"""The part of the run, as fractions of its steps, in which the kill begins."""

WITHIN_S = 0.1
"""The kill comes at most this much after its step: a few steps, so any moment of one."""

RESTART_AT_LATEST_S = 10.0
"""A victim is started again by then, even if the others have not gone on."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """Who is killed, and when."""

    victim: int
    at_step: int
    """The clock starts when the victim has committed this step …"""
    after_s: float
    """… and stops this many seconds later."""

    @classmethod
    def from_seed(cls, seed: int, *, groups: int, steps: int) -> Story:
        """The same seed gives the same story.

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


class Part(enum.Enum):
    """Where in the story the run is."""

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
class Scene:
    """What is known of the run at one moment."""

    now: float
    """`time.monotonic()`, seconds."""
    victim_step: int
    """Steps that the victim has committed."""
    all_took_part: bool
    """Whether there has been a step with every group in it."""
    went_on: bool
    """Whether the others have committed a step without the victim since the kill."""


class Director:
    """Follows a story; None as a story is a run without a kill."""

    def __init__(self, story: Story | None) -> None:
        self.story = story
        self.part = Part.BEGINNING
        self._mark = 0.0
        """When this part began."""

    def decide(self, scene: Scene) -> Act | None:
        """What to do now, if anything. Each act is told once."""
        if self.story is None:
            return None
        if self.part is Part.BEGINNING and self._is_reached(scene):
            self._turn_to(Part.AIMED, scene.now)
        if self.part is Part.AIMED and scene.now >= self._mark + self.story.after_s:
            self._turn_to(Part.DOWN, scene.now)
            return Kill(self.story.victim)
        late = scene.now >= self._mark + RESTART_AT_LATEST_S
        if self.part is Part.DOWN and (scene.went_on or late):
            self._turn_to(Part.RETURNING, scene.now)
            return Restart(self.story.victim)
        return None

    def _is_reached(self, scene: Scene) -> bool:
        assert self.story is not None
        return scene.all_took_part and scene.victim_step >= self.story.at_step

    def _turn_to(self, part: Part, now: float) -> None:
        self.part = part
        self._mark = now
