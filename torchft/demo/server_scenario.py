"""What a demo of the parameter server does and when: a pure decision from what is seen of it.

a and b train      b is killed      a goes on alone      c joins
the server is killed      a and c train on      it is started again      rounds close      end

controller = Controller()
act = controller.decide(snapshot)        # → KillWorker("b"), StartWorker("c"), …, else None
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Set
from dataclasses import dataclass

__all__ = [
    "FIRST",
    "JOINER",
    "SURVIVORS",
    "VICTIM",
    "Act",
    "Controller",
    "EndAt",
    "KillServer",
    "KillWorker",
    "Snapshot",
    "Stage",
    "StartServer",
    "StartWorker",
]

FIRST, VICTIM, JOINER = "a", "b", "c"
"""Those that train; the second is killed, the third comes later."""
SURVIVORS = (FIRST, JOINER)

TOGETHER = 3
"""Rounds until the kill, and that are still to come when the end is told: nobody may pass it by."""
ALONE = 2
"""Rounds without the victim, and after the server's return."""
DOWN_STEPS = 5
"""Steps that each worker is to train on without a server."""


@dataclass(frozen=True)
class KillWorker:
    """SIGKILL this worker's whole process tree now."""

    worker: str


@dataclass(frozen=True)
class StartWorker:
    """Start this one."""

    worker: str


@dataclass(frozen=True)
class KillServer:
    """SIGKILL the server now."""


@dataclass(frozen=True)
class StartServer:
    """Start it again, where it was."""


@dataclass(frozen=True)
class EndAt:
    """Tell the workers to end at this version of the common weights."""

    version: int


Act = KillWorker | StartWorker | KillServer | StartServer | EndAt


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is known of the run at one moment."""

    version: int
    """Of the common weights, as last heard: rounds that have closed."""
    members: Set[str]
    """Workers that the server knows."""
    steps: Mapping[str, int]
    """Worker → steps that it has taken."""
    syncs: Mapping[str, int]
    """Worker → rounds that it has taken part in."""


class Stage(enum.Enum):
    """Where in the story the run is."""

    GATHERING = "until both workers have closed some rounds"
    BEREFT = "until the first has gone on alone"
    JOINING = "until the third has closed a round with it"
    DOWN = "until both have trained on without a server"
    BACK = "until rounds close again"
    ENDING = "until all have ended"


class Controller:
    """Follows the story, forward only."""

    def __init__(self) -> None:
        self.stage = Stage.GATHERING
        self._version = 0
        """Of the weights when this part began."""
        self._steps: Mapping[str, int] = {}

    def decide(self, snapshot: Snapshot) -> Act | None:
        """What to do now, if anything. Each act is told once."""
        match self.stage:
            case Stage.GATHERING if self._gathered(snapshot):
                return self._turn(Stage.BEREFT, snapshot, KillWorker(VICTIM))
            case Stage.BEREFT if snapshot.version >= self._version + ALONE:
                return self._turn(Stage.JOINING, snapshot, StartWorker(JOINER))
            case Stage.JOINING if JOINER in snapshot.members and snapshot.syncs.get(JOINER, 0) >= 2:
                return self._turn(Stage.DOWN, snapshot, KillServer())
            case Stage.DOWN if all(self._went_on(snapshot, name) for name in SURVIVORS):
                return self._turn(Stage.BACK, snapshot, StartServer())
            case Stage.BACK if snapshot.version >= self._version + ALONE:
                return self._turn(Stage.ENDING, snapshot, EndAt(snapshot.version + TOGETHER))
        return None

    def _gathered(self, snapshot: Snapshot) -> bool:
        return {FIRST, VICTIM} <= snapshot.members and snapshot.version >= TOGETHER

    def _went_on(self, snapshot: Snapshot, name: str) -> bool:
        return snapshot.steps.get(name, 0) >= self._steps.get(name, 0) + DOWN_STEPS

    def _turn(self, stage: Stage, snapshot: Snapshot, act: Act) -> Act:
        self.stage, self._version, self._steps = stage, snapshot.version, dict(snapshot.steps)
        return act
