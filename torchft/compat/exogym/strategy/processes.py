"""EXO Gym's named strategies as programs of each process, for subclasses that override their steps.

    from torchft.compat.exogym.strategy.processes import SimpleReduceStrategy

    class Noisy(SimpleReduceStrategy):
        def step(self):
            for parameter in self.model.parameters():
                parameter.grad += 0.01 * torch.randn_like(parameter.grad)
            super().step()

Under their usual paths these names are recipes, which rows of one process run, and which never
call `step`, `_communicate` or `_init_node`. What is computed is the same. They have EXO Gym's
arguments alone: codecs, buffers and error feedback are the recipes'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchft.compat.exogym.strategy.communicate import all_reduce
from torchft.compat.exogym.strategy.communicate_optimize_strategy import CommunicateOptimizeStrategy
from torchft.compat.exogym.strategy.diloco import DiLoCoCommunicator
from torchft.compat.exogym.strategy.federated_averaging import AveragingCommunicator
from torchft.compat.exogym.strategy.optim import OptimSpec
from torchft.compat.exogym.strategy.sparta import RandomIndexSelector, SparseCommunicator

__all__ = [
    "DiLoCoStrategy",
    "FedAvgStrategy",
    "SPARTADiLoCoStrategy",
    "SPARTAStrategy",
    "SimpleReduceStrategy",
]

Optim = OptimSpec | type[torch.optim.Optimizer] | str | None


class SimpleReduceStrategy(CommunicateOptimizeStrategy):
    """Average all gradients, clip their mean, step."""

    def __init__(
        self, optim_spec: Optim = None, max_norm: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__([], optim_spec, max_norm, **kwargs)

    def step(self) -> None:
        """One step of all nodes alike."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                all_reduce(parameter.grad)
                parameter.grad /= self.num_nodes
        super().step()


class FedAvgStrategy(CommunicateOptimizeStrategy):
    """Average the weights every H steps, exactly."""

    def __init__(
        self,
        inner_optim: Optim = None,
        island_size: int | None = None,
        H: int = 1,
        max_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        modules = [AveragingCommunicator(island_size)]
        super().__init__(modules, max_norm=max_norm, inner_optim=inner_optim, **kwargs)
        self.island_size, self.H = island_size, H

    def _communicate(self) -> None:
        if (self.local_step + 1) % self.H == 0:
            super()._communicate()


class DiLoCoStrategy(CommunicateOptimizeStrategy):
    """Every H steps, exactly, an outer optimizer steps with the mean of what the nodes moved."""

    def __init__(
        self,
        optim_spec: Optim = None,
        outer_optim_spec: Optim = None,
        H: int = 100,
        max_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__([DiLoCoCommunicator(H, outer_optim_spec)], optim_spec, max_norm, **kwargs)
        self.H = H


class SPARTAStrategy(CommunicateOptimizeStrategy):
    """Average a share of the weights, at random, every `sparta_interval` steps."""

    def __init__(
        self,
        optim_spec: Optim = None,
        p_sparta: float = 0.005,
        sparta_interval: int = 1,
        max_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__([_Sparse(p_sparta, sparta_interval)], optim_spec, max_norm, **kwargs)
        self.p_sparta, self.sparta_interval = p_sparta, sparta_interval


class SPARTADiLoCoStrategy(CommunicateOptimizeStrategy):
    """SPARTA between the rounds of DiLoCo. Where both are due, SPARTA goes first."""

    def __init__(
        self,
        inner_optim_spec: Optim = None,
        outer_optim_spec: Optim = None,
        p_sparta: float = 0.005,
        sparta_interval: int = 1,
        H: int = 100,
        max_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        modules = [_Sparse(p_sparta, sparta_interval), DiLoCoCommunicator(H, outer_optim_spec)]
        super().__init__(modules, inner_optim_spec, max_norm, **kwargs)
        self.p_sparta, self.sparta_interval, self.H = p_sparta, sparta_interval, H


class _Sparse(SparseCommunicator):
    """In every so many steps."""

    def __init__(self, p: float, interval: int) -> None:
        super().__init__(RandomIndexSelector(p))
        self.interval = interval

    def communicate(self, model: nn.Module, rank: int, num_nodes: int, local_step: int) -> None:
        if (local_step + 1) % self.interval == 0:
            super().communicate(model, rank, num_nodes, local_step)
