"""`exogym.strategy.sparta_diloco`."""

from __future__ import annotations

from torchft import strategies
from torchft.compat.exogym.tolerance import tolerant

__all__ = ["SPARTADiLoCoStrategy"]


@tolerant
class SPARTADiLoCoStrategy(strategies.SPARTADiLoCoStrategy):
    """Both by its name in EXO Gym: see `torchft.strategies.SPARTADiLoCoStrategy`."""
