"""What changes a run, as values: decided by `Rounds` or ordered, written to the journal, applied.

    join     MemberJoined         a process registered
    gone     MemberLeft           a worker is a member no more
    take     Submission           a submission counts in the open round of its fragment
    close    RoundClosed          a round closed, with the submissions it counts and their weights
    expect   WorkersExpected      an order: another number of workers
    optimizer  OptimizerChanged   an order: another learning rate or momentum

The word on the left is the event's `kind`, which a journal line begins with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from torchft.parameter_server.core.rules import Departure, Rules
from torchft.parameter_server.core.submission import Share, Submission

__all__ = [
    "Event",
    "MemberJoined",
    "MemberLeft",
    "OptimizerChanged",
    "RoundClosed",
    "WorkersExpected",
    "event_from_json",
    "event_to_json",
]


@dataclass(frozen=True)
class MemberJoined:
    """A process of `worker` registered, and promised to be heard every `beat_s` seconds."""

    worker: str
    session: str
    beat_s: float
    kind: ClassVar[str] = "join"


@dataclass(frozen=True)
class MemberLeft:
    """`worker` is a member no more."""

    worker: str
    why: Departure
    kind: ClassVar[str] = "gone"


@dataclass(frozen=True)
class RoundClosed:
    """The step that makes `version` of `fragment` is decided: Σ weight · delta / len(shares)."""

    fragment: int
    version: int
    shares: tuple[Share, ...]
    kind: ClassVar[str] = "close"


@dataclass(frozen=True)
class WorkersExpected:
    """An order changed how many workers are expected. It outlives a restart with the same flags."""

    flags: list[int]
    """Workers and fewest workers of a round, as the command line of that server had them."""
    order: list[int]
    """The same, as ordered."""
    kind: ClassVar[str] = "expect"

    @classmethod
    def ordered(cls, rules: Rules, workers: int, min_workers: int) -> WorkersExpected:
        """An order to a server that was started with `rules`.

        Raises:
            SettingsError: these numbers cannot be.
        """
        replace(rules, workers=workers, min_workers=min_workers)
        return cls([rules.workers, rules.min_workers], [workers, min_workers])


@dataclass(frozen=True)
class OptimizerChanged:
    """An order changed the outer optimizer for the rounds that close from now on."""

    lr: float
    momentum: float
    kind: ClassVar[str] = "optimizer"


Event = MemberJoined | MemberLeft | Submission | RoundClosed | WorkersExpected | OptimizerChanged

_PLAIN = {
    known.kind: known for known in (MemberJoined, Submission, WorkersExpected, OptimizerChanged)
}
"""Events whose fields are JSON as they are."""


def event_to_json(event: Event) -> dict[str, Any]:
    """The fields of an event as JSON values; `event_from_json` is the inverse."""
    match event:
        case MemberLeft(worker, why):
            return {"worker": worker, "why": why.name}
        case RoundClosed(fragment, version, shares):
            rows = [[asdict(one.submission), one.weight, one.staleness] for one in shares]
            return {"fragment": fragment, "version": version, "shares": rows}
    return asdict(event)


def event_from_json(kind: str, data: Mapping[str, Any]) -> Event:
    """The event of a `kind` with these fields, as `event_to_json` gave them."""
    match kind:
        case "gone":
            return MemberLeft(data["worker"], Departure[data["why"]])
        case "close":
            shares = (Share(Submission(**s), weight, stale) for s, weight, stale in data["shares"])
            return RoundClosed(data["fragment"], data["version"], tuple(shares))
    return _PLAIN[kind](**data)
