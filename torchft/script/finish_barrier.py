"""How the groups of a job end with the same step, though one may be away just then.

After the last wanted step a group goes on until a step is committed in which *all* groups took
part: they read that from the same quorum, so all end with the same step. For a group that is away,
the others wait that long and no longer. A group that missed the last step heals `reached` too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torchft.script.ranks import first_rank_says

__all__ = ["FinishBarrier"]


class FinishBarrier:
    """Decides when a group may stop training so that all groups end with the same step.

    Register `state_dict` and `load_state_dict` with the manager, for a group that heals.

    Args:
        steps: how many steps the groups are to commit.
        groups: how many groups train together.
        patience_s: how long after the last wanted step to wait for a missing group, seconds.
    """

    def __init__(
        self,
        *,
        steps: int,
        groups: int,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
        agree: Callable[[bool], bool] = first_rank_says,
    ) -> None:
        self.reached = False
        self._steps = steps
        self._groups = groups
        self._patience_s = patience_s
        self._clock = clock
        self._agree = agree
        self._waits_since: float | None = None

    def committed(self, step: int, participants: int) -> Iterator[str]:
        """Call this after each committed step; yields lines that are worth printing."""
        if step == 1 and participants == 1 < self._groups:
            yield f"starts afresh from step 0, alone: none of the other {self._groups - 1} is there"
        if step < self._steps:
            return
        if participants >= self._groups:
            self.reached = True
            return
        yield from self._wait(step, self._groups - participants)

    def _wait(self, step: int, missing: int) -> Iterator[str]:
        now = self._clock()
        if self._waits_since is None:
            self._waits_since = now
            yield (
                f"step {step} is done, and {missing} of {self._groups} groups away: goes on for up "
                f"to {self._patience_s:g} s, to end together"
            )
        if self._agree(now - self._waits_since >= self._patience_s):
            self.reached = True
            yield f"ends at step {step} without {missing} of {self._groups} groups"

    def state_dict(self) -> dict[str, bool]:
        """Return what a group that heals needs to know."""
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Take over what another group knows: it may have ended in a step that this one missed."""
        self.reached = state["reached"]
