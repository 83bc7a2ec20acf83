"""`exogym.strategy.diloco`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from torchft import strategies
from torchft.compat.exogym.strategy.communicate import mean_over_nodes
from torchft.compat.exogym.strategy.communicate_optimize_strategy import CommunicationModule
from torchft.compat.exogym.strategy.optim import OptimSpec, ensure_optim_spec
from torchft.compat.exogym.tolerance import tolerant
from torchft.strategies.parts.precision import shared_dtype_of

__all__ = ["DiLoCoCommunicator", "DiLoCoStrategy"]


@tolerant
class DiLoCoStrategy(strategies.DiLoCoStrategy):
    """DiLoCo by its name in EXO Gym: see `torchft.strategies.DiLoCoStrategy`."""


class DiLoCoCommunicator(CommunicationModule):
    """Every H steps, exactly, an outer optimizer steps with the mean of what the nodes moved.

    Each node has the master copy and steps it with the same mean, so nothing but that mean travels.
    Of parameters in bf16 or fp16 it is fp32, as in `torchft.strategies.DiLoCoRecipe`.
    """

    def __init__(
        self,
        H: int = 100,
        outer_optim_spec: OptimSpec | type[torch.optim.Optimizer] | str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        default = OptimSpec(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
        self.H, self.outer_optim_spec = H, ensure_optim_spec(outer_optim_spec, default)

    def _init_node(self, model: nn.Module, rank: int, num_nodes: int) -> None:
        self.master_model = copy.deepcopy(model)
        for master in self.master_model.parameters():
            if master.is_floating_point():
                master.data = master.data.to(shared_dtype_of(master.dtype, torch.float32))
        self.outer_optimizer = self.outer_optim_spec.build(self.master_model)

    def communicate(self, model: nn.Module, rank: int, num_nodes: int, local_step: int) -> None:
        """A round, if one is due."""
        if num_nodes > 1 and (local_step + 1) % self.H == 0:
            self._outer_step(model, num_nodes)

    @torch.no_grad()
    def _outer_step(self, model: nn.Module, num_nodes: int) -> None:
        pairs = [
            (master, own)
            for master, own in zip(self.master_model.parameters(), model.parameters(), strict=True)
            if own.requires_grad
        ]
        for master, own in pairs:
            # What the nodes moved from: the master as they hold it.
            held = master.to(own.dtype).to(master.dtype)
            master.grad = held - mean_over_nodes(own, num_nodes)
        self.outer_optimizer.step()
        for master, own in pairs:
            own.copy_(master)
