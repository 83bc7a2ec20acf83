"""Where scales end, so that no number of a block leaves fp32's normal range."""

from __future__ import annotations

__all__ = ["LEAST_SCALE", "largest_scale"]

LEAST_SCALE = 2.0**-116
"""Blocks with a smaller one decode to zeros."""

_LARGEST = (2 - 2.0**-23) * 2.0**127


def largest_scale(limit: float) -> float:
    """A hair, 2⁻²², below what `limit` can be multiplied with."""
    return _LARGEST / limit * (1 - 2.0**-22)
