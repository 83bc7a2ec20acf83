"""`exogym.strategy.federated_averaging`."""

from __future__ import annotations

import inspect
import random
from typing import Any

import torch
from torch import Tensor, nn

from torchft import strategies
from torchft.compat.exogym.strategy.communicate import all_gather, mean_over_nodes
from torchft.compat.exogym.strategy.communicate_optimize_strategy import CommunicationModule
from torchft.compat.exogym.tolerance import tolerant

__all__ = ["AveragingCommunicator", "FedAvgStrategy"]


@tolerant
class FedAvgStrategy(strategies.FedAvgStrategy):
    """FedAvg by its name in EXO Gym, where all nodes weigh alike: see
    `torchft.strategies.FedAvgStrategy`."""

    def __init__(self, *args: Any, weighting: str | None = "equal", **options: Any) -> None:
        super().__init__(*args, weighting=weighting, **options)

    __init__.__signature__ = inspect.signature(  # type: ignore[attr-defined]
        strategies.FedAvgStrategy.__init__
    )


class AveragingCommunicator(CommunicationModule):
    """Average the weights of all nodes, or of random islands of `island_size`, at every call.

    New islands at every call: all nodes draw the same ones, from the step's number.
    """

    def __init__(self, island_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.island_size = island_size

    def _init_node(self, model: nn.Module, rank: int, num_nodes: int) -> None:
        """There is no state."""

    @torch.no_grad()
    def communicate(self, model: nn.Module, rank: int, num_nodes: int, local_step: int) -> None:
        """Average the parameters among the nodes of each island."""
        island = self._island(rank, num_nodes, local_step)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            if len(island) == num_nodes:
                parameter.copy_(mean_over_nodes(parameter, num_nodes))
            else:
                _average_within(parameter.data, island, num_nodes)

    def _island(self, rank: int, num_nodes: int, local_step: int) -> list[int]:
        ranks = list(range(num_nodes))
        size = self.island_size
        if size is None or size >= num_nodes:
            return ranks
        random.Random(local_step).shuffle(ranks)
        start = ranks.index(rank) // size * size
        return ranks[start : start + size]


def _average_within(tensor: Tensor, island: list[int], num_nodes: int) -> None:
    everyones = [torch.empty_like(tensor) for _ in range(num_nodes)]
    all_gather(everyones, tensor.contiguous())
    tensor.copy_(torch.stack([everyones[rank] for rank in sorted(island)]).mean(0))
