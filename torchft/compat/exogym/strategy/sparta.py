"""`exogym.strategy.sparta`: SPARTA by name, and its communicator with a selector of one's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchft import strategies
from torchft.compat.exogym.strategy.communicate import broadcast, mean_over_nodes
from torchft.compat.exogym.strategy.communicate_optimize_strategy import CommunicationModule
from torchft.compat.exogym.tolerance import tolerant
from torchft.errors import SettingsError

__all__ = [
    "IndexSelector",
    "PartitionedIndexSelector",
    "RandomIndexSelector",
    "SPARTAStrategy",
    "ShuffledSequentialIndexSelector",
    "SparseCommunicator",
]


@tolerant
class SPARTAStrategy(strategies.SPARTAStrategy):
    """SPARTA by its name in EXO Gym: see `torchft.strategies.SPARTAStrategy`."""


class IndexSelector:
    """Which numbers of a parameter are meant in a step: here all of them. To be subclassed."""

    def __init__(self, p: float = 1.0) -> None:
        if not 0 < p <= 1:
            raise SettingsError(f"p={p} is not a share: use more than 0 and up to 1")
        self.p = p
        self.state: dict[Tensor, Tensor] = {}

    def get_indices(self, param: Tensor, iteration: int) -> Tensor:
        """A mask of the shape of `param`, of bools."""
        return torch.ones_like(param, dtype=torch.bool)

    def _parts(self, param: Tensor) -> int:
        return max(1, min(math.ceil(1 / self.p - 1e-9), param.numel()))


class RandomIndexSelector(IndexSelector):
    """Each with probability `p`, anew in every step."""

    def get_indices(self, param: Tensor, iteration: int) -> Tensor:
        """A mask of the shape of `param`, of bools."""
        return torch.rand(param.shape, device=param.device) < self.p


class ShuffledSequentialIndexSelector(IndexSelector):
    """One random order for good, cut into ceil(1/p) chunks, which come in turn."""

    def get_indices(self, param: Tensor, iteration: int) -> Tensor:
        """A mask of the shape of `param`, of bools."""
        if param not in self.state:
            self.state[param] = torch.randperm(param.numel(), device=param.device)
        return self._part(param, iteration)

    def _part(self, param: Tensor, iteration: int) -> Tensor:
        parts = self._parts(param)
        part = (self.state[param] * parts // param.numel()).view(param.shape)
        return part == iteration % parts


class PartitionedIndexSelector(ShuffledSequentialIndexSelector):
    """A random partition into ceil(1/p) parts, which come in turn; a new one after each walk."""

    def get_indices(self, param: Tensor, iteration: int) -> Tensor:
        """A mask of the shape of `param`, of bools."""
        if iteration % self._parts(param) == 0:
            self.state.pop(param, None)
        return super().get_indices(param, iteration)


class SparseCommunicator(CommunicationModule):
    """Average what the selector of node 0 chooses, of each parameter that has a gradient.

    The mask travels too, a byte for each number: a selector may look at what is only node 0's.
    """

    def __init__(self, index_selector: IndexSelector, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.index_selector = index_selector

    def _init_node(self, model: nn.Module, rank: int, num_nodes: int) -> None:
        """There is no state."""

    @torch.no_grad()
    def communicate(self, model: nn.Module, rank: int, num_nodes: int, local_step: int) -> None:
        """Average the selected elements of the parameters among all nodes."""
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                mask = self.index_selector.get_indices(parameter, local_step)
                broadcast(mask, src=0)
                chosen = mean_over_nodes(parameter.data[mask], num_nodes)
                parameter.data.masked_scatter_(mask, chosen.to(parameter.dtype))
