"""What workers ask, as checked values: the edge where JSON becomes types."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchft.arguments import check_integer, check_number
from torchft.parameter_server.core.refused import Refused
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.core.submission import Submission

__all__ = ["Registration", "SubmissionOffer", "WorkerSession"]

_NAME = re.compile(r"(?!\.+$)[\w.:@+\-]{1,200}")
"""Not `.` or `..`: a name may become a part of a path."""
_LARGEST = 1 << 53


def text(data: Mapping[str, Any], name: str) -> str:
    """The field `name` of a request: a name without surprises.

    Raises:
        Refused: it is none.
    """
    value = data.get(name)
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise Refused(
            f"{name}: give 1 to 200 letters, digits or any of . : @ + - _, and not dots alone"
        )
    return value


def integer(data: Mapping[str, Any], name: str, least: int = 0) -> int:
    """The field `name` of a request: an integer from `least` to 2**53.

    Raises:
        Refused: it is none.
    """
    value: int = data.get(name)  # type: ignore[assignment]
    check_integer(name, value, least=least, most=_LARGEST, error=Refused)
    return value


def real(data: Mapping[str, Any], name: str) -> float:
    """The field `name` of a request: a number from 0 on, below 1e12; 0 where it is absent.

    Raises:
        Refused: it is none.
    """
    value = data.get(name, 0.0)
    check_number(name, value, least=0, below=1e12, error=Refused)
    return float(value)


@dataclass(frozen=True)
class WorkerSession:
    """Who asks: a worker's id, and which process of it."""

    worker: str
    session: str

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> WorkerSession:
        """The worker session that a request says it comes from.

        Raises:
            Refused: it does not say who it is.
        """
        return cls(text(data, "worker"), text(data, "session"))


@dataclass(frozen=True)
class Registration:
    """A process that wants to take part."""

    who: WorkerSession
    shape: ModelShape
    beat_s: float
    hostname: str
    wished: dict[str, Any]
    """Some of `Agreed`'s fields."""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Registration:
        """The registration that the fields of a request describe.

        Raises:
            Refused: a field is missing or cannot be.
            MismatchError: it describes no model.
        """
        wished = data.get("wished", {})
        model = data.get("model")
        if not isinstance(wished, dict) or not isinstance(model, dict):
            raise Refused("a registration has a model and wishes, as objects")
        shape = ModelShape.from_json(model)
        name = text(data, "hostname") if "hostname" in data else "unknown"
        return cls(WorkerSession.of(data), shape, real(data, "beat_s"), name, wished)


@dataclass(frozen=True)
class SubmissionOffer:
    """A submission whose numbers a worker wants to send, and the model that they are of."""

    submission: Submission
    fingerprint: str

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> SubmissionOffer:
        """The offer that the fields of a request describe.

        Raises:
            Refused: a field is missing or cannot be.
        """
        who = WorkerSession.of(data)
        least = {"fragment": 0, "base": 0, "number": 1, "steps": 0, "tokens": 1}
        numbers = {name: integer(data, name, low) for name, low in least.items()}
        parts = (who.worker, who.session, numbers["fragment"], numbers["number"])
        upload = hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:32]
        submission = Submission(who.worker, who.session, **numbers, upload=upload)
        return cls(submission, text(data, "fingerprint"))
