"""What decides when a round closes: the server's settings, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torchft.arguments import check_integer, check_number
from torchft.errors import SettingsError

__all__ = ["Departure", "Mode", "Refusal", "Rules", "Waiting"]


class Mode(StrEnum):
    """How submissions become a step of the outer optimizer."""

    SYNCHRONOUS = "synchronous"
    """All members submit, then one step is taken with the mean."""
    DECOUPLED = "decoupled"
    """A quorum submits, a short grace window gathers more, the rest counts in the next round."""
    ASYNCHRONOUS = "asynchronous"
    """Each submission is a round of its own."""


class Waiting(StrEnum):
    """Why an open round is not closed."""

    NOTHING = "nobody has submitted yet"
    NOT_ALL_HERE = "fewer workers have registered than the run begins with"
    BELOW_MINIMUM = "fewer workers have submitted than the minimum"
    MEMBERS = "members have not submitted yet"
    ONLY_LATE = "fewer workers than the minimum have submitted work of this round"
    GRACE = "the quorum is there, and the grace window runs"


class Refusal(StrEnum):
    """Why an event is not taken."""

    NAME_TAKEN = "another process with this id was heard a moment ago"
    NOT_REGISTERED = "this worker is not registered"
    NO_FRAGMENT = "there is no such fragment"
    TOO_STALE = "it was measured from weights that are too old"
    FULL = "there are as many workers as the server takes"


class Departure(StrEnum):
    """Why a member is one no more."""

    LEFT = "it left"
    SILENT = "it was silent for too long"
    KICKED = "it was sent away"
    REPLACED = "a new process took its id"


@dataclass(frozen=True)
class Rules:
    """The settings that decide when a round closes.

    Raises:
        SettingsError: a value that cannot be.
    """

    workers: int
    """A synchronous run begins when so many have registered."""
    mode: Mode = Mode.SYNCHRONOUS
    min_workers: int = 1
    """A round never closes with submissions of fewer workers. The quorum of the decoupled mode."""
    grace_s: float = 5.0
    """A member that is silent for so long is not waited for; the longest grace window."""
    heartbeat_timeout_s: float = 120.0
    """A member that is silent for so long is one no more; 0: it stays."""
    max_staleness: int | None = None
    """Submissions that are more rounds behind are refused; None: none is."""
    max_members: int = 4096

    def __post_init__(self) -> None:
        for name in ("workers", "min_workers", "max_members"):
            check_integer(name, getattr(self, name), least=1)
        if self.min_workers > self.workers:
            raise SettingsError(
                f"min_workers={self.min_workers} of {self.workers} expected workers: no round "
                "could close; lower it, or expect more workers"
            )
        check_number("grace_s", self.grace_s, above=0)
        if self.heartbeat_timeout_s and not self.heartbeat_timeout_s >= self.grace_s:
            raise SettingsError(
                f"heartbeat_timeout_s={self.heartbeat_timeout_s:g} is shorter than "
                f"grace_s={self.grace_s:g}: a member would be gone before it counts as silent"
            )
        if self.max_staleness is not None:
            check_integer("max_staleness", self.max_staleness, least=0)

    @property
    def beat_s(self) -> float:
        """Seconds between two signs of life, so that silence is told from a slow network."""
        return self.grace_s / 4
