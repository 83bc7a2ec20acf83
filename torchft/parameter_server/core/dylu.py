"""Dynamic local updates: slower workers take fewer steps between two synchronisations.

    H_w = max(1, ⌊H · v_w / v_max⌋)      v: inner steps per second

Workers of speeds 4 and 1 with H = 100 get 100 and 25, so that both submit equally often. One whose
speed is not known yet gets H. (Liu et al., arXiv 2401.09135, section 5.)
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["local_steps"]


def local_steps(base: int, speeds: Mapping[str, float], worker: str) -> int:
    """The steps that `worker` should take; `speeds` in steps per second, 0 where unknown."""
    fastest = max(speeds.values(), default=0.0)
    mine = speeds.get(worker, 0.0)
    if mine <= 0:
        return base
    # 3 * (1 / 3) must be 1: what rounding takes away is given back.
    return max(1, int(base * (mine / fastest) + 1e-9))
