"""After which steps a worker submits, and which fragment. Pure.

The k-th slot of a cycle of H steps comes after step ⌊kH/N⌋, for any H ≥ N:

    H = 500, N = 4    125, 250, 375, 500        H = 10, N = 4    2, 5, 7, 10

A change of H holds from the next cycle on. At a slot the fragment with the least (version,
position) is due that is not in flight, so workers that joined at different times take the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from torchft.errors import SettingsError

__all__ = ["Schedule", "due"]


class Schedule:
    """Counts steps; `every` is H, `fragments` N."""

    def __init__(self, every: int, fragments: int) -> None:
        if not 1 <= fragments <= every:
            raise SettingsError(f"{fragments} fragments do not fit into {every} steps")
        self.every, self.fragments = every, fragments
        self._wished = every
        self._step = 0
        self._slot = 1

    def change(self, every: int) -> None:
        """From the next cycle on."""
        self._wished = max(every, self.fragments)

    def advance(self) -> bool:
        """One step more; whether a slot comes after it."""
        self._step += 1
        if self._step < self._slot * self.every // self.fragments:
            return False
        self._slot += 1
        if self._slot > self.fragments:
            self._step, self._slot, self.every = 0, 1, self._wished
        return True


def due(versions: Mapping[int, int], flying: Set[int]) -> int | None:
    """The fragment to submit; None: all are in flight."""
    idle = [(version, fragment) for fragment, version in versions.items() if fragment not in flying]
    return min(idle)[1] if idle else None
