"""What has happened since the start, for whoever looks: counts, the last rounds and events."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from torchft.parameter_server.core.rounds import RoundClosed

__all__ = ["Counts", "History"]

_ROUNDS, _EVENTS = 200, 50
"""So many of the last ones are kept."""


@dataclass
class Counts:
    """What has happened since the start."""

    rounds: int = 0
    submissions: int = 0
    late: int = 0
    refused: int = 0
    departures: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    apply_s: float = 0.0
    checkpoints: int = 0


@dataclass(frozen=True)
class _Round:
    """One that has closed."""

    at: float
    fragment: int
    version: int
    submissions: int
    steps: int
    """Of all its submissions."""
    staleness: int
    """The most."""
    apply_s: float
    """Waiting for the round before included."""


class History:
    """`now` is of the server's clock, in seconds."""

    def __init__(self) -> None:
        self._rounds: deque[_Round] = deque(maxlen=_ROUNDS)
        self._events: deque[tuple[float, str]] = deque(maxlen=_EVENTS)

    def note(self, now: float, what: str) -> None:
        """Something that a person may want to know."""
        self._events.append((now, what))

    def closed(self, now: float, close: RoundClosed, apply_s: float) -> None:
        """A round's step was taken."""
        self._rounds.append(
            _Round(
                now,
                close.fragment,
                close.version,
                close.divisor,
                sum(share.submission.steps for share in close.shares),
                max(share.staleness for share in close.shares),
                apply_s,
            )
        )

    def rounds(self, now: float) -> list[dict[str, Any]]:
        """As JSON, oldest first; `s_ago` instead of a time of a clock that nobody else has."""
        return [{"s_ago": now - one.at, **_without_time(one)} for one in self._rounds]

    def events(self, now: float) -> list[dict[str, Any]]:
        """As JSON, newest first."""
        return [{"s_ago": now - at, "what": what} for at, what in reversed(self._events)]


def _without_time(one: _Round) -> dict[str, Any]:
    fields = asdict(one)
    del fields["at"]
    return fields
