"""How long to wait before something is tried, or looked at, again.

Pauses double from the first to the longest. Each is drawn at random between half of it and all of
it (jitter): workers that lost their server in the same moment do not all come back in the same one.
Where somebody can say that it has happened, wait on a condition, an event or a socket instead.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

__all__ = ["pauses", "wait_until"]

_uniform = random.SystemRandom().uniform
"""Neither the script's own random numbers nor, after a fork, those of a sibling."""


def pauses(
    first_s: float, longest_s: float, *, uniform: Callable[[float, float], float] = _uniform
) -> Iterator[float]:
    """The seconds to wait before the second attempt, the third and so on, without an end."""
    pause_s = first_s
    while True:
        yield uniform(pause_s / 2, pause_s)
        pause_s = min(2 * pause_s, longest_s)


def wait_until(
    happened: Callable[[], object],
    within_s: float,
    *,
    first_s: float = 0.002,
    longest_s: float = 0.02,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> bool:
    """Look after growing pauses whether it has `happened`; False if not `within_s` seconds.

    The last look is at the deadline or just after it, the first one at once.
    """
    until = clock() + within_s
    waits = pauses(first_s, longest_s)
    while not happened():
        left_s = until - clock()
        if left_s <= 0:
            return False
        sleep(min(next(waits), left_s))
    return True
