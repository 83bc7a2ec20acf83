"""SPARTA: after each step the nodes average a small random subset of their weights.

    S ← selector(round, seed)            the same at all nodes: no mask travels
    w[S] ← mean over the nodes of w[S]

Two nodes at (1, 2, 3) and (3, 4, 5) whose subset is {1} go on from (1, 3, 3) and (3, 3, 5). With a
share of 0.005 it sends a 200th of what all-reduce does, and yet the nodes stay close.
(EXO: Beton et al., "Improving the efficiency of distributed training using sparse parameter
averaging", ICLR 2025 workshop on modularity for collaborative and decentralised deep learning.)

Of weights in bf16 or fp16 the mean is taken in fp32, unless `shared_dtype` says otherwise, and
rounded once: a mean of equal numbers is that number.

After a discarded round everything stands. A node that heals goes on from its donor's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchft.arguments import check_integer
from torchft.errors import SettingsError
from torchft.renamed import renamed_arguments
from torchft.seeds import seed63
from torchft.strategies.local import Fragment
from torchft.strategies.parts.precision import (
    SharedDtype,
    check_shared_dtype,
    shared_dtype_of,
)
from torchft.strategies.parts.selectors import Selector
from torchft.strategies.recipe import Recipe

__all__ = ["SpartaRecipe"]

Draft = tuple[list[Tensor], list[Tensor]]
"""The subset, and what was selected."""


class SpartaRecipe(Recipe):
    """Average what `selector` names every `sync_every` inner steps."""

    varies = True

    @renamed_arguments(every="sync_every")
    def __init__(
        self,
        selector: Selector,
        sync_every: int = 1,
        *,
        seed: int = 0,
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        check_integer("sync_every", sync_every, least=1)
        if isinstance(selector, type):
            name = selector.__name__
            raise SettingsError(f"the selector is the class {name}: give an instance, {name}(…)")
        self.selector, self.sync_every, self.seed = selector, sync_every, seed
        self.shared_dtype = check_shared_dtype(shared_dtype)

    def setup(self) -> None:
        """Note how large the tensors are."""
        flats = self.local.weights(self.local.whole)
        self._flats = [(flat.shape[1], flat.device) for flat in flats]
        self.local.release(flats, reusable=True)

    def positions(self) -> list[Tensor]:
        """The subset of this round, of each flat tensor."""
        turn = self.clock.steps // self.sync_every - 1
        return [
            self.selector(numel, turn, seed63(self.seed, flat)).to(device)
            for flat, (numel, device) in enumerate(self._flats)
        ]

    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], Draft]:
        """The weights of the subset; nothing of a tensor that the subset misses."""
        subset = self.positions()
        some = self.local.select(fragment, subset)
        dtypes = [shared_dtype_of(part.dtype, self.shared_dtype) for part in some]
        sent = [p.to(dtype) for p, dtype in zip(some, dtypes, strict=True) if p.shape[1]]
        return sent, (subset, some)

    def named(self, fragment: Fragment, received: list[Tensor], draft: Draft) -> dict[str, Tensor]:
        """By parameter; what is not of the subset is zero."""
        subset, _ = draft
        arrived = iter(received)
        whole = [torch.zeros(1, n, dtype=torch.double, device=at) for n, at in self._flats]
        for flat, at in zip(whole, subset, strict=True):
            if len(at):
                flat[:, at] = next(arrived).to(flat.dtype)
        return self.local.named_views(fragment, whole)

    def apply_locally(self, fragment: Fragment, update: list[Tensor], draft: Draft) -> None:
        """Write the averaged elements to their places in the weights."""
        subset, some = draft
        arrived = iter(update)
        means = [next(arrived).to(p.dtype) if p.shape[1] else p for p in some]
        self.local.put(fragment, subset, means)
