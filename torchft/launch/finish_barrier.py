"""How a group of an example keeps company with the others: it says when it starts alone, and it
ends with them.

After the last wanted step a group goes on until a step is committed in which *all* groups took
part: they read that from the same quorum, so all end with the same step. For a group that is away,
the others wait that long and no longer. Who missed the last step heals `reached` with the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torchft.launch.inside import first_rank_says

__all__ = ["FinishBarrier"]


class FinishBarrier:
    """Whether a group has reached its end.

    Args:
        steps: that the groups are to commit.
        groups: that train together.
        patience_s: how long after the last wanted step a missing group is waited for.
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
        """Call after each committed step, and exhaust: what is worth a line."""
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
        """What a group that heals needs to know."""
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Another group may have reached the end in a step that this one missed."""
        self.reached = state["reached"]
