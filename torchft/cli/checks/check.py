"""The answer to one question about this machine: how it is, what that means, what to do."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Check", "Status"]


class Status(enum.StrEnum):
    """How a check of `torchft doctor` went."""

    OK = "ok"
    WARN = "warn"
    """A long run may suffer from it, or some set-ups will not work."""
    FAIL = "fail"
    """Training in replica groups cannot work like this."""


@dataclass(frozen=True)
class Check:
    """One checked fact, as a line of `torchft doctor`."""

    name: str
    status: Status
    found: str
    """What is the case, with figures."""
    remedy: str = ""
    """What to do. Empty when it is ok."""

    @classmethod
    def ok(cls, name: str, found: str) -> Check:
        """A check that asks for no action."""
        return cls(name, Status.OK, found)

    @classmethod
    def warn(cls, name: str, found: str, remedy: str) -> Check:
        """A check whose result may matter, with advice."""
        return cls(name, Status.WARN, found, remedy)

    @classmethod
    def fail(cls, name: str, found: str, remedy: str) -> Check:
        """A check that found what will not work, with advice."""
        return cls(name, Status.FAIL, found, remedy)
