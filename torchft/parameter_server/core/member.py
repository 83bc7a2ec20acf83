"""A worker as the rounds see it: who it is, when it was heard, how often it submits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchft.parameter_server.core.rules import Rules

__all__ = ["RoundMember"]

_NEWEST = 0.5
"""How much the newest interval counts in the running mean."""


@dataclass
class RoundMember:
    """`session` is drawn anew by every process, so that a restarted worker is told from a twin."""

    session: str
    heard_at: float
    beat_s: float = 0.0
    """It promised to be heard this often; 0: it promised nothing, and is never silent."""
    steps_per_s: float = 0.0
    taken: dict[int, int] = field(default_factory=dict)
    """Fragment → number of its last submission that was taken: what makes a repeat harmless."""
    arrived_at: dict[int, float] = field(default_factory=dict)
    """Fragment → when it last submitted."""
    interval_s: dict[int, float] = field(default_factory=dict)
    """Fragment → running mean of the time between two submissions."""

    def hear(self, now: float) -> None:
        """Note that the worker was heard at `now`; any word from it is a sign of life."""
        self.heard_at = max(self.heard_at, now)

    def is_silent(self, now: float, rules: Rules) -> bool:
        """Whether it has been silent for so long that nobody waits for it."""
        return self.beat_s > 0 and now - self.heard_at > self.patience_s(rules)

    def patience_s(self, rules: Rules) -> float:
        """Seconds of silence that are patiently waited: the grace window, or three of its beats."""
        return max(rules.grace_s, 3 * self.beat_s)

    def take(self, now: float, fragment: int, number: int) -> None:
        """Note that a submission counts, and learn from its time how often this worker submits."""
        self.hear(now)
        self.taken[fragment] = number
        before = self.arrived_at.get(fragment)
        self.arrived_at[fragment] = now
        if before is not None:
            seen = now - before
            mean = self.interval_s.get(fragment, seen)
            self.interval_s[fragment] = mean + _NEWEST * (seen - mean)

    def forget_pace(self) -> None:
        """Unlearn how often it submits: a replayed journal does not say when things happened."""
        self.arrived_at, self.interval_s = {}, {}

    def due_at(self, fragment: int) -> float | None:
        """When its next submission of a fragment is to be expected; None where nobody knows."""
        if fragment not in self.interval_s:
            return None
        return self.arrived_at[fragment] + self.interval_s[fragment]

    def state_dict(self) -> dict[str, Any]:
        """What a restarted server must know; times are of a clock that ended with it."""
        taken = {str(fragment): number for fragment, number in self.taken.items()}
        return {"session": self.session, "beat_s": self.beat_s, "taken": taken}

    @classmethod
    def from_state(cls, state: dict[str, Any], now: float) -> RoundMember:
        """A member of a checkpoint, as if it had just been heard: it has time to come back."""
        taken = {int(fragment): number for fragment, number in state["taken"].items()}
        return cls(state["session"], now, state["beat_s"], taken=taken)
