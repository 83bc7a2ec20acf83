"""The answer to one question about this machine: how it is, what that means, what to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Check", "Status"]


class Status(enum.StrEnum):
    """How it is."""

    OK = "ok"
    WARN = "warn"
    """A long run may suffer from it, or some set-ups will not work."""
    FAIL = "fail"
    """Training in replica groups cannot work like this."""


@dataclass(frozen=True)
class Check:
    """One line of the doctor."""

    name: str
    status: Status
    found: str
    """What is the case, with figures."""
    remedy: str = ""
    """What to do. Empty when it is ok."""

    @classmethod
    def ok(cls, name: str, found: str) -> Check:
        """Nothing to do."""
        return cls(name, Status.OK, found)

    @classmethod
    def warn(cls, name: str, found: str, remedy: str) -> Check:
        """It may matter."""
        return cls(name, Status.WARN, found, remedy)

    @classmethod
    def fail(cls, name: str, found: str, remedy: str) -> Check:
        """It will not work."""
        return cls(name, Status.FAIL, found, remedy)
