"""What has happened since the start, for whoever looks: counts, the last rounds and events."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from torchft.parameter_server.core.events import RoundClosed

__all__ = ["Counts", "History"]

_ROUNDS, _EVENTS = 200, 50
"""So many of the last ones are kept."""


@dataclass
class Counts:
    """Totals since the start; bytes are those of encoded numbers."""

    rounds: int = 0
    submissions: int = 0
    late: int = 0
    refused: int = 0
    departures: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    outer_step_s: float = 0.0
    checkpoints: int = 0


class History:
    """The last rounds and events. `now` is of the server's clock, in seconds; what is read says how
    long ago it was, since nobody else has that clock."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[float, dict[str, Any]]] = deque(maxlen=_ROUNDS)
        self._events: deque[tuple[float, str]] = deque(maxlen=_EVENTS)

    def note(self, now: float, what: str) -> None:
        """Keep a line that a person may want to read."""
        self._events.append((now, what))

    def closed(self, now: float, close: RoundClosed, apply_s: float) -> None:
        """Keep a round whose step was taken, `apply_s` after it was decided."""
        about = {
            "fragment": close.fragment,
            "version": close.version,
            "submissions": len(close.shares),
            "steps": sum(share.submission.steps for share in close.shares),
            "staleness": max(share.staleness for share in close.shares),
            "apply_s": apply_s,
        }
        self._rounds.append((now, about))

    def rounds(self, now: float) -> list[dict[str, Any]]:
        """The last rounds as JSON values, oldest first."""
        return [{"s_ago": now - at, **about} for at, about in self._rounds]

    def events(self, now: float) -> list[dict[str, Any]]:
        """The last events as JSON values, newest first."""
        return [{"s_ago": now - at, "what": what} for at, what in reversed(self._events)]
