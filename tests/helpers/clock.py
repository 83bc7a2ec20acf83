"""A clock that a test moves."""

from __future__ import annotations

__all__ = ["Clock"]


class Clock:
    """Call it for the time in seconds; only the test moves it."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
