"""What a run tells of its rounds and heals, whether simulated or read from real processes. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from torchft.peers import Place

__all__ = ["HealRecord", "RoundRecord"]


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round that has closed."""

    step: int
    """Inner step in which it closed, from 0."""
    place: Place
    kind: str
    """average, ordered, quantized, gather or islands. Buffers that ride along are gathered."""
    members: tuple[int, ...]
    counted: tuple[int, ...]
    """Those whose contribution went in: a member that has just healed has none of its own."""
    committed: bool
    bytes_per_node: dict[int, int]
    """Payload that each member sent."""
    collectives: int = 1
    recipe: int = 0
    """Position in the strategy."""
    restores: bool = True
    """A discarded round makes this recipe take back what was trained since the last one."""
    delay: int = 0
    """Inner steps that its members took between its opening and its close."""


@dataclass(frozen=True)
class HealRecord:
    """Which node got the state of which other node."""

    step: int
    node: int
    donor: int
    nbytes: int
