"""A round from its opening to its close, and what of it a node gets that heals meanwhile.

A donor carries over what it has received, for it has waited for that by then, and when the round
closes: who heals has no part in the round's collectives, and closes it as the others do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchft.finite import not_finite
from torchft.peers import Handle, Peers, Round
from torchft.strategies.buffers import LEFT, Buffers
from torchft.strategies.checks import contributed
from torchft.strategies.local import Fragment, Local
from torchft.strategies.parts import buckets
from torchft.strategies.recipe import By, Recipe
from torchft.strategies.recovery import Recovery

__all__ = ["Applying", "InFlight"]

Applying = Callable[[], AbstractContextManager[object]]
"""Gives a context that is entered while weights and state are written."""


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

    @classmethod
    def opened(
        cls,
        recipe: Recipe,
        fragment: Fragment,
        peers_round: Round,
        now: int,
        *,
        bucket_bytes: int | None,
    ) -> InFlight:
        """Send what `recipe` contributes to a round that opened at the clock's time `now`, at most
        `bucket_bytes` of an average in one collective."""
        sent, draft = contributed(recipe, fragment)
        cut = bucket_bytes if recipe.by is By.AVERAGE else None
        return cls(
            recipe=recipe,
            fragment=fragment,
            round=peers_round,
            sent=sent,
            handle=_communicated(recipe, peers_round, sent, draft, cut),
            draft=draft,
            buffers=_buffers(recipe, peers_round),
            closes=now + recipe.delay,
            cut=cut is not None,
        )

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

    def close(self, recovery: Recovery, applying: Applying) -> bool:
        """Vote, then apply the result, or go back to the last synchronisation.

        Args:
            recovery: of the strategy's recipes.
            applying: gives a context that is entered while weights and state are written.

        Returns:
            Whether the round was committed.
        """
        applied = False
        try:
            received = self.judged()
            broken = self.buffers.wait() if self.buffers is not None else None
            if broken is not None and not self.round.failed:
                self.round.fail(broken)
            if self.round.close():
                with applying():
                    self._apply(received, recovery)
                applied = True
        except Exception as error:
            self.round.fail(error)
            raise
        finally:
            self.recipe.local.release(self.sent, reusable=applied)
            if not applied:
                self._go_back(recovery, applying)
        return applied

    def _apply(self, received: list[Tensor], recovery: Recovery) -> None:
        update = self.recipe.apply(self.fragment, received)
        self.recipe.apply_locally(self.fragment, update, self.draft)
        if self.buffers is not None:
            self.buffers.apply_locally(recovery.buffers)

    def _go_back(self, recovery: Recovery, applying: Applying) -> None:
        broken = recovery.broken(self.recipe, self.fragment)
        with applying():
            self.recipe.discard(self.fragment, self.draft)
        with applying():
            recovery.mend(self.recipe, self.fragment, broken)

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


def _communicated(
    recipe: Recipe, peers_round: Round, sent: list[Tensor], draft: Any, bucket_bytes: int | None
) -> Handle:
    if recipe.by is By.GATHER:
        return peers_round.gather(sent)
    if recipe.by is By.ISLANDS:
        return peers_round.average_within(sent, recipe.islands)
    error_feedback: list[Tensor] | None = draft if recipe.error_feedback else None
    if bucket_bytes is not None:
        if error_feedback is not None:
            error_feedback = buckets.cut(error_feedback, bucket_bytes, like=sent)
        sent = buckets.cut(sent, bucket_bytes)
    return peers_round.average(sent, recipe.codec, error_feedback)


def _buffers(recipe: Recipe, peers_round: Round) -> Buffers | None:
    if recipe.buffers == LEFT or not recipe.local.buffers()[0]:
        return None
    return Buffers.sent(recipe.local, recipe.buffers, peers_round)


@dataclass(frozen=True)
class _Arrived(Handle):
    """What a donor had received already."""

    tensors: list[Tensor]

    def wait(self) -> list[Tensor]:
        return self.tensors
