"""Where a replica group's wall time went, from its first spawn to its last exit: a pure sum.

A worker's own ledger covers its process, from its creation to its last record. The launcher adds
what a dead or unborn process cannot measure:

    launch   spawn of the agent → creation of the worker
    lost     last record → the kill: work on a step that nobody committed
    down     the kill, or a worker's death → the next spawn
    exit     the worker's last word → the agent is gone

The launcher reads when a worker was created by itself, so that the sum over the buckets equals the
wall time only if the worker's ledger covers its whole life: `unexplained_s` is that check.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torchft.launch.group import Life

__all__ = ["LaunchBucket", "TimeAccount", "WorkerTrace", "account"]

TOLERANCE_S = 0.1
"""Creation times are known to 10 ms, and there are two readings of them for each life."""


class LaunchBucket(enum.StrEnum):
    """What only the launcher can see. Documented at the top of this file."""

    LAUNCH = "launch"
    LOST = "lost"
    DOWN = "down"
    EXIT = "exit"


@dataclass(frozen=True, kw_only=True)
class WorkerTrace:
    """One worker process, rank 0 of its group."""

    born: float
    """Its creation as the launcher read it, `time.monotonic()` in seconds."""
    last_word: float
    """When it last told its ledger, same clock."""
    ledger: Mapping[str, float]
    """That ledger: seconds by bucket since its creation."""


@dataclass(frozen=True, kw_only=True)
class TimeAccount:
    """A group's wall time by bucket."""

    wall_s: float
    """First spawn to last exit, by the launcher's clock."""
    seconds: Mapping[str, float]
    """By bucket; empty ones are left out."""

    @property
    def unexplained_s(self) -> float:
        """Wall time in no bucket; below 0: time in two."""
        return self.wall_s - sum(self.seconds.values())

    @property
    def adds_up(self) -> bool:
        """Whether the buckets are the wall time, to the exactness of the clocks."""
        return abs(self.unexplained_s) <= max(TOLERANCE_S, 0.005 * self.wall_s)

    @property
    def other_share(self) -> float:
        """The part of the wall time that no bucket has a name for, 0 to 1."""
        return self.seconds.get("other", 0.0) / self.wall_s if self.wall_s > 0 else 0.0


def account(lives: Sequence[tuple[Life, Sequence[WorkerTrace]]]) -> TimeAccount:
    """The account of a group that is no longer running, from its lives and their workers in order.

    Raises:
        ValueError: there is no life, or one has not ended.
    """
    if not lives or any(life.ended is None for life, _ in lives):
        raise ValueError("an account needs lives that have ended")
    seconds: defaultdict[str, float] = defaultdict(float)
    for life, workers in lives:
        _add_life(seconds, life, workers)
    for (life, _), (following, _) in pairwise(lives):
        seconds[LaunchBucket.DOWN] += following.spawned - _end_of(life)
    wall_s = _end_of(lives[-1][0]) - lives[0][0].spawned
    return TimeAccount(
        wall_s=wall_s, seconds={str(name): value for name, value in seconds.items() if value}
    )


def _add_life(seconds: defaultdict[str, float], life: Life, workers: Sequence[WorkerTrace]) -> None:
    if not workers:
        seconds[LaunchBucket.LAUNCH] += _end_of(life) - life.spawned
        return
    seconds[LaunchBucket.LAUNCH] += workers[0].born - life.spawned
    for worker in workers:
        for bucket, spent in worker.ledger.items():
            seconds[bucket] += spent
    for worker, following in pairwise(workers):  # the agent restarted its worker
        seconds[LaunchBucket.DOWN] += following.born - worker.last_word
    after = LaunchBucket.EXIT if life.killed is None else LaunchBucket.LOST
    seconds[after] += _end_of(life) - workers[-1].last_word


def _end_of(life: Life) -> float:
    """A killed life ends with the kill, not when its last process is found to be gone."""
    end = life.killed if life.killed is not None else life.ended
    assert end is not None
    return end
