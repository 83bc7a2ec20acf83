"""After which inner steps a round is due, and which fragment it is about. Pure.

The k-th slot of a cycle of H steps comes after step ⌊kH/N⌋, for any H ≥ N:

    H = 500, N = 4    125, 250, 375, 500        H = 10, N = 4    2, 5, 7, 10

The fragment with the fewest outer steps is due that is not in flight, so nodes that joined at
different times take the same one. `DiLoCo` and the worker of a parameter server both ask here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torchft.errors import SettingsError

__all__ = ["RoundSchedule", "is_slot", "next_fragment"]


def is_slot(step: int, sync_every: int, fragments: int) -> bool:
    """Whether `step` is ⌊k · sync_every / fragments⌋ for an integer k."""
    return -(-step * fragments // sync_every) * sync_every < (step + 1) * fragments


def next_fragment(versions: Sequence[int], in_flight: Collection[int]) -> int | None:
    """The fragment that the next round is about; None when all are in flight.

    Args:
        versions: how many outer steps each fragment has had.
        in_flight: fragments of rounds that are open.
    """
    idle = [fragment for fragment in range(len(versions)) if fragment not in in_flight]
    return min(idle, key=lambda fragment: versions[fragment]) if idle else None


class RoundSchedule:
    """Counts inner steps, and says when a slot comes. `sync_every` is H, and may change.

    Raises:
        SettingsError: if there are more fragments than steps in a cycle.
    """

    def __init__(self, sync_every: int, fragments: int) -> None:
        if not 1 <= fragments <= sync_every:
            raise SettingsError(f"{fragments} fragments do not fit into {sync_every} steps")
        self.sync_every, self.fragments = sync_every, fragments
        self._next_every = sync_every
        self._step = 0

    def change(self, sync_every: int) -> None:
        """From the next cycle on, take as many steps to a cycle, at least one for each fragment."""
        self._next_every = max(sync_every, self.fragments)

    def advance(self) -> bool:
        """Count one inner step; returns whether a slot comes after it."""
        self._step += 1
        slot = is_slot(self._step, self.sync_every, self.fragments)
        if self._step == self.sync_every:
            self._step, self.sync_every = 0, self._next_every
        return slot
