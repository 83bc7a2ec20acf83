"""Where one rank stands: how far it has come, and how its last steps ended.

progress = Progress(fresh=True)
progress.commit(groups=3)       # step 1, 3 batches
progress.discard()              # 1 in a row: the next process group is made anew
progress.skip()                 # NaN in an average: communication works, nothing is made anew
progress.fall_behind(groups=3)  # the step that was committed could not be applied here
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Progress"]


@dataclass
class Progress:
    """The steps of one rank so far."""

    fresh: bool
    """Not in a quorum yet, and wants the initial synchronisation."""
    step: int = 0
    """The last committed step."""
    batches_committed: int = 0
    """How many groups' batches the committed steps hold."""
    discarded: int = 0
    """Steps in a row that were not committed, but for those that were skipped."""
    skipped: int = 0
    """Steps in a row, up to the last one, that were discarded for NaN in an average."""
    heals_failed: int = 0
    """Of those discarded, the last ones in a row: this rank could not heal in them."""

    has_committed: bool = field(default=False, compare=False)
    """This process has committed a step, and so have all ranks of its group."""

    def commit(self, groups: int) -> None:
        """One more step, with a batch of each of so many groups."""
        self.has_committed = True
        self.step += 1
        self.batches_committed += groups
        self.meet()

    def meet(self) -> None:
        """All members of a quorum met, and whoever was behind has healed."""
        self.fresh = False
        self.discarded = self.skipped = self.heals_failed = 0

    def discard(self, *, heal_failed: bool = False) -> None:
        """A step came to nothing; `heal_failed`: because this rank could not heal in it."""
        self.discarded += 1
        self.skipped = 0
        self.heals_failed = self.heals_failed + 1 if heal_failed else 0

    def skip(self, *, met: bool) -> None:
        """An average was not finite, and nothing else was wrong. `met`: this rank has the state
        that the members of the quorum share."""
        self.skipped += 1
        self.heals_failed = 0
        self.fresh = self.fresh and not met

    @property
    def commit_failures(self) -> int:
        """What the lighthouse is told: how many steps in a row, up to the last one, failed for a
        reason that a new process group may mend."""
        return 0 if self.skipped else self.discarded

    def fall_behind(self, groups: int) -> None:
        """A step back: the last one, with batches of so many groups, was not applied."""
        self.step -= 1
        self.batches_committed -= groups

    def state_dict(self) -> dict[str, int]:
        """What is saved with a checkpoint, and given to a group that heals."""
        return {"step": self.step, "batches_committed": self.batches_committed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from the step that `state` holds."""
        self.step = state["step"]
        self.batches_committed = state["batches_committed"]
