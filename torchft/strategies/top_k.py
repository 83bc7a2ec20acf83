"""DiLoCo whose deltas are sent in part: the largest numbers of each chunk, the rest later.

    e ← β e + (backup - w)               the residual takes up what this node moved
    q ← the k largest of e, by chunk     all that is sent
    e ← e - q
    backup ← outer(backup, mean over the nodes of q);  w ← backup

Example, k = 1 of 2, β = 1: a node moved by (0.3, 0.2). It sends 0.3 at position 0 and keeps
(0, 0.2); if next time it moves by (0.1, 0.1), it sends 0.3 at position 1 and keeps (0.1, 0).
(SparseLoCo: Sarfi et al., arXiv 2508.15706.)

Where the paper and its authors' code differ, both can be had. `mean_over`: the paper's mean is over
all "members" of a round, so that a number which one of N nodes sent counts a Nth; their code takes
it over the "senders" of each number, which learns faster and is the default. `chunks_of`: a chunk
is of the "model", all parameters in a row, or, in their code, of each "tensor"
(`parts/chunks.py`); they learn alike, and what the first sends does not depend on the shapes.

The backup, the outer optimizer, the residual and what travels are fp32 where parameters are bf16 or
fp16, unless `shared_dtype` says otherwise (`parts/precision.py`).

After a discarded round the residual and the weights stand as they are: the next delta, from the
same backup, has this one in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchft.arguments import check_choice, check_integer, check_number
from torchft.renamed import renamed_arguments
from torchft.strategies.local import Fragment
from torchft.strategies.parts import chunks
from torchft.strategies.parts.backup import Backup
from torchft.strategies.parts.broken import broken_rows
from torchft.strategies.parts.chunks import MODEL
from torchft.strategies.parts.largest import MEAN_OVER, SENDERS, largest, mean_of, packed
from torchft.strategies.parts.outer import FlatOuter, OuterFactory
from torchft.strategies.parts.precision import SharedDtype, check_shared_dtype, weights_as
from torchft.strategies.recipe import By, Recipe

__all__ = ["TopKRecipe"]

Draft = tuple[list[Tensor], list[Tensor]]
"""The residual with this round's delta, and where in it is what was sent."""


class TopKRecipe(Recipe):
    """`topk` numbers of each `chunk` every `sync_every` steps; the residual fades by `decay`."""

    by = By.GATHER
    moves_frozen = True

    @renamed_arguments(outer="outer_optimizer", every="sync_every")
    def __init__(
        self,
        outer_optimizer: OuterFactory,
        sync_every: int,
        *,
        topk: int = 64,
        chunk: int = 4096,
        decay: float = 0.95,
        mean_over: str = SENDERS,
        chunks_of: str = MODEL,
        shared_dtype: SharedDtype = torch.float32,
        backup_device: torch.device | str | None = None,
    ) -> None:
        for name, count in {"sync_every": sync_every, "topk": topk, "chunk": chunk}.items():
            check_integer(name, count, least=1)
        check_number("decay", decay, least=0, most=1)
        chunks.check_chunks_of(chunks_of, chunk)
        self.sync_every, self.topk, self.chunk, self.decay = sync_every, topk, chunk, decay
        self.mean_over, self.chunks_of = check_choice("mean_over", mean_over, MEAN_OVER), chunks_of
        self.shared_dtype = check_shared_dtype(shared_dtype)
        self.outer = FlatOuter(outer_optimizer)
        self._device = backup_device

    def setup(self) -> None:
        """Remember the weights that all start from; no residual yet."""
        whole = self.local.whole
        self.backup = Backup(self.local, whole, device=self._device, dtype=self.shared_dtype)
        self.outer.bind([self.local.whole], [self.backup])
        flats = weights_as(self.local, whole, self.shared_dtype)
        self._chunks = chunks.chunks_of(self.chunks_of, self.chunk, self.local, whole, flats)
        self.own["residual"] = self._chunks.zeros(self.local.rows)
        self.local.release(flats, reusable=True)

    def take_backup(self) -> None:
        """The weights as they are now are the global ones."""
        self.backup.take()

    def compared(self) -> dict[str, str]:
        """Also what is sent, and what its mean is."""
        said = f"{self.topk} of {self.chunk} of each {self.chunks_of}, decay {self.decay}"
        outer = {"outer optimizer": self.outer.described()}
        return {**super().compared(), **outer, "top-k": f"{said}, mean over {self.mean_over}"}

    def settle_in(self) -> None:
        """Start from the global weights, not from the donor's local ones."""
        self.backup.restore()

    @torch.no_grad()
    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], Draft]:
        """The largest of residual and delta together."""
        residual = [old * self.decay for old in self.own["residual"]]
        deltas = self.local.delta(fragment, self.backup.flats)
        self._chunks.add(residual, deltas)
        self.local.release(deltas, reusable=True)
        where = largest(residual, self.topk)
        return packed(residual, where), (residual, where)

    @torch.no_grad()
    def apply(self, fragment: Fragment, received: list[Tensor]) -> list[Tensor]:
        """Take the outer step with the averaged coefficients."""
        means = mean_of(received, self.own["residual"], self.topk, self.mean_over)
        self.outer.step(fragment, self._chunks.join(means, self.backup.flats))
        return self.backup.flats

    @torch.no_grad()
    def apply_locally(self, fragment: Fragment, update: list[Tensor], draft: Draft) -> None:
        """What was sent is no residual any more; go on from the new global weights."""
        for old, new, sent in zip(self.own["residual"], *draft, strict=True):
            old.copy_(new.scatter_(-1, sent, 0.0))
        self.local.set_weights(fragment, update)

    def discard(self, fragment: Fragment, draft: Draft) -> None:
        """Weights stand; those of a node that are not finite go back to the global ones."""
        if broken := broken_rows(self.local, fragment):
            self.backup.restore(broken)

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
