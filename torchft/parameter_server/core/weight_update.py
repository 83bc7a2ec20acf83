"""How a worker reads the weights that a server sends."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["UpdateKind"]


class UpdateKind(StrEnum):
    """How news are to be read."""

    FULL = "whole"
    """fp32 weights that replace the old ones."""
    DELTAS = "deltas"
    """Encoded differences, to be added one after the other."""
