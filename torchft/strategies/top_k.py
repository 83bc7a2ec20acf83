"""DiLoCo whose deltas are sent in part: the largest numbers of each chunk, the rest later.

    e ← β e + (backup - w)               the residual takes up what this node moved
    q ← the k largest of e, by chunk     all that is sent
    e ← e - q
    backup ← outer(backup, mean over the nodes of q);  w ← backup

Example, k = 1 of 2, β = 1: a node moved by (0.3, 0.2). It sends 0.3 at position 0 and keeps
(0, 0.2); if next time it moves by (0.1, 0.1), it sends 0.3 at position 1 and keeps (0.1, 0).
(SparseLoCo: Sarfi et al., arXiv 2508.15706.)

The backup, the outer optimizer, the residual and what travels are fp32 where parameters are bf16 or
fp16, unless `shared_dtype` says otherwise (`parts/precision.py`).

After a no the residual and the weights stand as they are: the next delta, from the same backup,
has this one in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchft.strategies.local import Fragment
from torchft.strategies.parts.backup import Backup
from torchft.strategies.parts.largest import largest, mean_of, packed
from torchft.strategies.parts.outer import FlatOuter, OuterFactory
from torchft.strategies.parts.precision import SharedDtype, check_shared_dtype, weights_as
from torchft.strategies.ranges import check_number
from torchft.strategies.recipe import By, Recipe

__all__ = ["TopK"]

Draft = tuple[list[Tensor], list[Tensor]]
"""The residual with this round's delta, and where in it is what was sent."""


class TopK(Recipe):
    """`topk` numbers of every `chunk`, every `every` inner steps; the residual fades by `decay`."""

    by = By.GATHER

    def __init__(
        self,
        outer: OuterFactory,
        every: int,
        *,
        topk: int = 64,
        chunk: int = 4096,
        decay: float = 0.95,
        shared_dtype: SharedDtype = torch.float32,
        backup_device: torch.device | str | None = None,
    ) -> None:
        for name, count in {"every": every, "topk": topk, "chunk": chunk}.items():
            check_number(name, count, least=1, whole=True)
        check_number("decay", decay, least=0, most=1)
        self.every, self.topk, self.chunk, self.decay = every, topk, chunk, decay
        self.shared_dtype = check_shared_dtype(shared_dtype)
        self.outer = FlatOuter(outer)
        self._device = backup_device

    def setup(self) -> None:
        """Remember the weights that all start from; no residual yet."""
        whole = self.local.whole
        self.backup = Backup(self.local, whole, device=self._device, dtype=self.shared_dtype)
        self.outer.bind([self.local.whole], [self.backup])
        flats = weights_as(self.local, whole, self.shared_dtype)
        self.own["residual"] = [self._chunks(flat) for flat in flats]
        self.local.release(flats, reusable=True)

    def _chunks(self, flat: Tensor) -> Tensor:
        """Zeros for `[rows, n]`, filled up to whole chunks: `[rows, m, chunk]`."""
        size = max(1, min(self.chunk, flat.shape[1]))
        return flat.new_zeros(self.local.rows, -(-flat.shape[1] // size), size)

    def settle_in(self) -> None:
        """Start from the global weights, not from the donor's local ones."""
        self.backup.restore()

    @torch.no_grad()
    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], Draft]:
        """The largest of residual and delta together."""
        residual = [old * self.decay for old in self.own["residual"]]
        deltas = self.local.delta(fragment, self.backup.flats)
        for new, delta in zip(residual, deltas, strict=True):
            new.flatten(1)[:, : delta.shape[1]] += delta
        self.local.release(deltas, reusable=True)
        where = largest(residual, self.topk)
        return packed(residual, where), (residual, where)

    @torch.no_grad()
    def apply(self, fragment: Fragment, received: list[Tensor]) -> list[Tensor]:
        """The outer step."""
        means = mean_of(received, self.own["residual"], self.topk)
        backup = self.backup.flats
        average = [m.view(1, -1)[:, : b.shape[1]] for m, b in zip(means, backup, strict=True)]
        self.outer.step(fragment, [a.contiguous() for a in average])
        return backup

    @torch.no_grad()
    def adopt(self, fragment: Fragment, news: list[Tensor], draft: Draft) -> None:
        """What was sent is no residual any more; go on from the new global weights."""
        for old, new, sent in zip(self.own["residual"], *draft, strict=True):
            old.copy_(new.scatter_(-1, sent, 0.0))
        self.local.set_weights(fragment, news)

    def state_dict(self) -> dict[str, Any]:
        """The backup, the outer optimizer, the clock."""
        return {
            "original_parameters": self.backup.views(),
            "outer_optimizer": self.outer.state_dict(self.local.whole),
            "inner_steps": self.clock.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a donor's; the weights follow when the round has opened."""
        self.backup.load(state["original_parameters"])
        self.outer.load_state_dict(self.local.whole, state["outer_optimizer"])
        self.clock.steps = state["inner_steps"]
