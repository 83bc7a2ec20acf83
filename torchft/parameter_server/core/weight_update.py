"""What a server tells a worker of weights that have changed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["UpdateKind", "WeightUpdate"]


class UpdateKind(StrEnum):
    """How the files of an update are to be read."""

    FULL = "whole"
    """fp32 weights that replace the old ones."""
    DELTAS = "deltas"
    """Encoded differences, to be added one after the other."""


@dataclass(frozen=True)
class WeightUpdate:
    """The files that make `version` of the weights that a worker has."""

    version: int
    identity: str
    """Of the weights that result."""
    kind: UpdateKind
    files: tuple[str, ...]
