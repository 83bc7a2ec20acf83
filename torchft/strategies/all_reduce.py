"""Average the gradients of every step: data parallelism.

    g ← mean over the nodes of g        before every inner step

Two nodes with gradients 1 and 3 both step with 2. A no skips the inner step; nothing else changes.
It sends all gradients in every step, and keeps all nodes equal. (Li et al., arXiv 2006.15704.)
"""

from __future__ import annotations

from torch import Tensor

from torchft.peers import Place
from torchft.strategies.local import Fragment
from torchft.strategies.recipe import Recipe

__all__ = ["AllReduce"]


class AllReduce(Recipe):
    """The recipe behind `DistributedDataParallel`, which does the same bucket by bucket."""

    place = Place.BEFORE

    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], None]:
        """The gradients."""
        return self.local.grads(fragment), None

    def named(self, fragment: Fragment, received: list[Tensor], draft: None) -> dict[str, Tensor]:
        """By parameter."""
        return self.local.named_views(fragment, received)

    def adopt(self, fragment: Fragment, news: list[Tensor], draft: None) -> None:
        """The mean gradients are this node's gradients."""
        self.local.set_grads(fragment, news)
