"""Many timings in five numbers.

The minimum is the work itself, whoever else uses the machine; the median is what a user sees; the
99th percentile and the maximum show what the machine did besides.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Spread", "in_turns", "repeat", "timed"]


@dataclass(frozen=True)
class Spread:
    """In the unit of whoever made it."""

    min: float
    p50: float
    p99: float
    max: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], *, scale: float = 1.0) -> Spread:
        """The spread of `values`, each times `scale` (1e3: seconds to milliseconds)."""
        ordered = sorted(value * scale for value in values)
        last = len(ordered) - 1
        return cls(
            min=ordered[0],
            p50=statistics.median(ordered),
            p99=ordered[round(last * 0.99)],
            max=ordered[last],
            n=len(ordered),
        )


def timed(act: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that `act` takes, by `clock`."""
    began = clock()
    act()
    return clock() - began


def repeat(times: int, act: Callable[[], object]) -> list[float]:
    """Seconds of each of several runs of `act`."""
    return [timed(act) for _ in range(times)]


def in_turns(
    times: int,
    acts: Iterable[Callable[[], object]],
    *,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Seconds of each act, `times` times in turns, so that a busy machine slows all of them.
    `before` is called before each, and not timed."""
    acts = list(acts)
    found: list[list[float]] = [[] for _ in acts]
    for _ in range(times):
        for seconds, act in zip(found, acts, strict=True):
            before()
            seconds.append(timed(act, clock))
    return found
