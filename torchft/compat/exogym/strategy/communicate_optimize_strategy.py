"""`exogym.strategy.communicate_optimize_strategy`: a local step, then what modules communicate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchft.compat.exogym.strategy.optim import OptimSpec, ensure_optim_spec
from torchft.compat.exogym.strategy.strategy import Strategy

__all__ = ["CommunicateOptimizeStrategy", "CommunicationModule"]


class CommunicationModule(ABC):
    """What nodes do with each other's weights after a step. `self.strategy` is the one it is in."""

    strategy: Strategy

    def __init__(self, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            setattr(self, name, value)

    @abstractmethod
    def communicate(self, model: nn.Module, rank: int, num_nodes: int, local_step: int) -> None:
        """Change `model` in place. `local_step` counts from 0 the steps that are done before."""

    @abstractmethod
    def _init_node(self, model: nn.Module, rank: int, num_nodes: int) -> None:
        """In each process, once, before the first step."""


class CommunicateOptimizeStrategy(Strategy):
    """Clip, step, and then every module in turn.

    Args:
        communication_modules: in their order; or override `_communicate`.
        optim_spec, inner_optim, inner_optim_spec: three names of the local optimizer; AdamW.
        max_norm: the local gradient is clipped to this L2 norm.
    """

    def __init__(
        self,
        communication_modules: Sequence[CommunicationModule],
        optim_spec: OptimSpec | type[torch.optim.Optimizer] | str | None = None,
        max_norm: float | None = None,
        *,
        inner_optim: OptimSpec | type[torch.optim.Optimizer] | str | None = None,
        inner_optim_spec: OptimSpec | type[torch.optim.Optimizer] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = next((one for one in (optim_spec, inner_optim, inner_optim_spec) if one), None)
        self.inner_optim_spec = self.optim_spec = ensure_optim_spec(given)
        self.communication_modules = list(communication_modules)
        self.max_norm = max_norm
        for module in self.communication_modules:
            module.strategy = self

    def _init_node(self, model: nn.Module, rank: int, num_nodes: int) -> None:
        super()._init_node(model, rank, num_nodes)
        for module in self.communication_modules:
            module._init_node(model, rank, num_nodes)
        self.optim = self.inner_optim_spec.build(model)
        self._setup_scheduler()

    def step(self) -> None:
        """One step of this node, and what is communicated after it."""
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optim.step()
        self._communicate()
        super().step()

    def _communicate(self) -> None:
        """Every module in turn, in every step; override it for another timing."""
        for module in self.communication_modules:
            module.communicate(self.model, self.rank, self.num_nodes, self.local_step)
