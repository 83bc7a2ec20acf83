"""Many timings in five numbers.

The minimum is the work itself, whoever else uses the machine; the median is what a user sees; the
99th percentile and the maximum show what the machine did besides.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Spread", "repeat", "timed"]


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


def timed(act: Callable[[], object]) -> float:
    """Seconds that `act` takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def repeat(times: int, act: Callable[[], object]) -> list[float]:
    """Seconds of each of several runs of `act`."""
    return [timed(act) for _ in range(times)]
