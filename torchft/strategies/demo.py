"""DeMo: each node keeps its momentum to itself and sends only what stands out of it.

    m ← β m + g                          momentum, each node's own
    q ← the k largest of DCT(m), by block of each parameter
    m ← m - inverse DCT(q)               what was sent is forgotten, the rest goes on growing
    g ← sign(inverse DCT(mean over the nodes of q))

Example, one block of two numbers and k = 1: m = (3, 1) has the coefficients (2.83, 1.41). The first
is sent; m keeps (1, -1), which is the second; a node alone goes on with g = sign(2, 2) = (1, 1).
It sends 6 bytes for each of k numbers in a block of up to chunk x chunk, in every step.
(Peng et al., arXiv 2411.19870.) The mean is over the "senders" of each coefficient, as in the
authors' code and EXO Gym's; with `mean_over="members"` it is over all nodes of a round, and one
that did not send a coefficient counts with zero.

The transform is linear and orthonormal, so the momentum is kept in coefficients: forgetting is
setting to zero. After a discarded round nothing is written: momentum and weights stand, the
gradient is lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchft.arguments import check_choice, check_integer, check_number
from torchft.errors import SettingsError
from torchft.peers import Place
from torchft.strategies.local import Fragment
from torchft.strategies.optim_spec import OptimSpec
from torchft.strategies.parts.dct import Blocks, dct, inverse_dct
from torchft.strategies.parts.largest import MEAN_OVER, SENDERS, largest, mean_of, packed
from torchft.strategies.recipe import By, Recipe

__all__ = ["DeMoRecipe"]

_PLAIN = {"lr", "weight_decay", "foreach", "fused", "differentiable"}
"""What SGD can be given and still be plain."""

Draft = tuple[list[Tensor], list[Tensor]]
"""The momentum with this step's gradient, and where in it is what was sent."""


class DeMoRecipe(Recipe):
    """`topk` coefficients of each block, whose sides are at most `chunk`; momentum by `decay`.

    `max_norm` clips each node's gradient before the momentum takes it up; the sign is not clipped.
    """

    place = Place.BEFORE
    by = By.GATHER

    def __init__(
        self,
        decay: float = 0.999,
        topk: int = 32,
        chunk: int = 64,
        *,
        max_norm: float | None = None,
        mean_over: str = SENDERS,
    ) -> None:
        check_number("compression_decay", decay, least=0, below=1)
        check_integer("compression_topk", topk, least=1)
        check_integer("compression_chunk", chunk, least=1)
        if max_norm is not None:
            check_number("max_norm", max_norm, above=0)
        self.decay, self.topk, self.chunk, self.max_norm = decay, topk, chunk, max_norm
        self.mean_over = check_choice("mean_over", mean_over, MEAN_OVER)

    def check_inner(self, optim: OptimSpec) -> None:
        """The sign is stepped by plain SGD, as in the paper and its authors' code. Momentum or
        AdamW would take the signs for gradients.

        Raises:
            SettingsError: it is another optimizer, or has other options.
        """
        strange = [name for name, value in optim.kwargs.items() if value and name not in _PLAIN]
        if optim.cls is not torch.optim.SGD or strange:
            raise SettingsError(
                f"DeMo keeps the momentum itself and steps by its sign, and {optim!r} would work "
                "on signs: use OptimSpec(torch.optim.SGD, lr=…), with a weight_decay at most"
            )

    def setup(self) -> None:
        """How the parameters are cut; no momentum yet."""
        flats = self.local.weights(self.local.whole)
        self._kinds = [(flat.shape[1], flat.dtype, flat.device) for flat in flats]
        self.blocks = Blocks(self.local.views(self.local.whole, flats), self.chunk)
        self.local.release(flats, reusable=True)
        self.own["momentum"] = self.blocks.zeros(self.local.rows)

    def compared(self) -> dict[str, str]:
        """What is sent, and what its mean is."""
        said = f"{self.topk} of {self.chunk} x {self.chunk}, decay {self.decay}"
        return {"DeMo": f"{said}, mean over {self.mean_over}"}

    @torch.no_grad()
    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], Draft]:
        """The largest coefficients, and where they are."""
        grads = self.local.grads(fragment)
        views = self.local.views(fragment, grads)
        momentum = [old * self.decay for old in self.own["momentum"]]
        for row in range(self.local.rows):
            gradient = self._clipped(self.blocks.cut(views, row))
            for new, blocks in zip(momentum, gradient, strict=True):
                new[row] += dct(blocks).view(new.shape[1:])
        self.local.release(grads, reusable=True)
        where = largest(momentum, self.topk)
        return packed(momentum, where), (momentum, where)

    def _clipped(self, gradient: list[Tensor]) -> list[Tensor]:
        if self.max_norm is not None:
            norm = torch.stack([torch.linalg.vector_norm(blocks) for blocks in gradient]).norm()
            for blocks in gradient:
                blocks.mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        return gradient

    @torch.no_grad()
    def apply(self, fragment: Fragment, received: list[Tensor]) -> list[Tensor]:
        """Step by the sign of the averaged momentum."""
        means = mean_of(received, self.own["momentum"], self.topk, self.mean_over)
        update = [torch.empty(1, n, dtype=dtype, device=at) for n, dtype, at in self._kinds]
        blocks = [
            inverse_dct(mean.view(-1, *group.side))
            for mean, group in zip(means, self.blocks.groups, strict=True)
        ]
        self.blocks.join(blocks, self.local.views(fragment, update))
        return [flat.sign_() for flat in update]

    @torch.no_grad()
    def apply_locally(self, fragment: Fragment, update: list[Tensor], draft: Draft) -> None:
        """Forget what was sent; the sign is this node's gradient."""
        for old, new, sent in zip(self.own["momentum"], *draft, strict=True):
            old.copy_(new.scatter_(-1, sent, 0.0))
        self.local.set_grads(fragment, update)
