"""A worker as the rounds see it: who it is, when it was heard, how often it submits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchft.parameter_server.core.rules import Rules

__all__ = ["Member"]

_NEWEST = 0.5
"""How much the newest interval counts in the running mean."""


@dataclass
class Member:
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
        """Any word from it is a sign of life."""
        self.heard_at = max(self.heard_at, now)

    def is_silent(self, now: float, rules: Rules) -> bool:
        """Long enough that nobody waits for it."""
        return self.beat_s > 0 and now - self.heard_at > self.patience_s(rules)

    def patience_s(self, rules: Rules) -> float:
        """The grace window, or three beats of one that beats slowly."""
        return max(rules.grace_s, 3 * self.beat_s)

    def arrive(self, fragment: int, now: float) -> None:
        """Learn its pace."""
        before = self.arrived_at.get(fragment)
        self.arrived_at[fragment] = now
        if before is not None:
            seen = now - before
            mean = self.interval_s.get(fragment, seen)
            self.interval_s[fragment] = mean + _NEWEST * (seen - mean)

    def due_at(self, fragment: int) -> float | None:
        """When its next submission is to be expected; None: nobody knows."""
        if fragment not in self.interval_s:
            return None
        return self.arrived_at[fragment] + self.interval_s[fragment]

    def state_dict(self) -> dict[str, Any]:
        """What a restarted server must know; times are of a clock that ended with it."""
        taken = {str(fragment): number for fragment, number in self.taken.items()}
        return {"session": self.session, "beat_s": self.beat_s, "taken": taken}

    @classmethod
    def from_state(cls, state: dict[str, Any], now: float) -> Member:
        """As if it had just been heard: it has the grace window to come back."""
        taken = {int(fragment): number for fragment, number in state["taken"].items()}
        return cls(state["session"], now, state["beat_s"], taken=taken)
