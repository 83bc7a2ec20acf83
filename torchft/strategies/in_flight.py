"""A round between its opening and its close, and what of it a node gets that heals meanwhile.

A donor carries over what it has received, for it has waited for that by then, and when the round
closes: who heals has no part in the round's collectives, and closes it as the others do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchft.finite import not_finite
from torchft.peers import Handle, Peers, Round
from torchft.strategies.buffers import Buffers
from torchft.strategies.local import Fragment, Local
from torchft.strategies.parts import buckets
from torchft.strategies.recipe import By, Recipe

__all__ = ["InFlight"]


@dataclass(kw_only=True)
class InFlight:
    """One round that is open while training goes on."""

    recipe: Recipe
    fragment: Fragment
    round: Round
    sent: list[Tensor]
    handle: Handle
    closes: int
    """The clock's time of the close."""
    draft: Any = None
    buffers: Buffers | None = None
    cut: bool = False
    """What it sent travels in buckets."""

    @property
    def half_way(self) -> int:
        """The clock's time when the first half of what travels should have arrived."""
        return self.closes - self.recipe.delay // 2

    def received(self) -> list[Tensor]:
        """Wait for the result, whole again."""
        received = self.handle.wait()
        return buckets.join(received, self.sent) if self.cut else received

    def judged(self) -> list[Tensor]:
        """Wait for the result, which fails the round where it is not finite. All judge alike, but
        within islands, which receive each its own."""
        received, alike = self.received(), self.recipe.by is not By.ISLANDS
        if alike and not self.round.failed and not self.handle.is_finite():
            self.round.fail(not_finite(self.recipe.named(self.fragment, received, self.draft)))
        return received

    def carried(self) -> dict[str, Any]:
        """What `taken_over` needs beside the recipe. Waits for the result."""
        return {
            "fragment": self.fragment.index,
            "closes": self.closes,
            "received": self.received(),
            "buffers": None if self.buffers is None else self.buffers.received(),
            "round": self.round.carried(),
        }

    @classmethod
    def taken_over(
        cls, carried: Mapping[str, Any], recipe: Recipe, local: Local, peers: Peers
    ) -> InFlight:
        """The donor's round, at a node that heals."""
        received = list(carried["received"])
        beside = None
        if carried["buffers"] is not None:
            beside = Buffers(local, recipe.buffers, _Arrived(list(carried["buffers"])))
        return cls(
            recipe=recipe,
            fragment=recipe.of(carried["fragment"]),
            round=peers.take_over(carried["round"]),
            sent=received,
            handle=_Arrived(received),
            closes=carried["closes"],
            buffers=beside,
        )


@dataclass(frozen=True)
class _Arrived(Handle):
    """What a donor had received already."""

    tensors: list[Tensor]

    def wait(self) -> list[Tensor]:
        return self.tensors
