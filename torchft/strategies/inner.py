"""How each node steps at home: clip, optimizer, schedule. One kernel call steps all nodes.

The optimizer sees one contiguous tensor per node and parameter, in every runtime, so that a node's
bits do not depend on how many others live in its process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import SettingsError
from torchft.strategies.optim_spec import OptimSpec
from torchft.strategies.schedule import ScheduleSpec

__all__ = ["Inner", "InnerOptimizer"]


@dataclass(frozen=True)
class Inner:
    """The recipe of the inner step."""

    optim: OptimSpec = field(default_factory=OptimSpec)
    schedule: ScheduleSpec | None = None
    max_norm: float | None = None
    """Each node's gradient is clipped to this L2 norm."""

    def __post_init__(self) -> None:
        if self.max_norm is not None and not self.max_norm > 0:
            raise SettingsError(f"max_norm={self.max_norm} must be above 0")

    def config(self) -> dict[str, Any]:
        """The settings as plain data."""
        schedule = self.schedule.config() if self.schedule is not None else None
        return {"optim": self.optim.config(), "schedule": schedule, "max_norm": self.max_norm}

    def build(self, nodes: Sequence[Sequence[nn.Parameter]], max_steps: int) -> InnerOptimizer:
        """For the parameters of each node that lives here.

        Raises:
            SettingsError: a parameter is not contiguous; fused kernels would spoil it.
        """
        return InnerOptimizer(self, nodes, max_steps)


class InnerOptimizer:
    """The inner optimizer of all nodes of one process."""

    def __init__(
        self, spec: Inner, nodes: Sequence[Sequence[nn.Parameter]], max_steps: int
    ) -> None:
        self._nodes = [list(node) for node in nodes]
        for number, parameter in enumerate(self._nodes[0]):
            if not parameter.is_contiguous():
                raise SettingsError(
                    f"parameter {number} of shape {tuple(parameter.shape)} is not contiguous: "
                    "make it so before training (p.data = p.data.contiguous())"
                )
        self._max_norm = spec.max_norm
        self.optimizer = spec.optim.build(p for node in self._nodes for p in node)
        self.schedule = spec.schedule.build(self.optimizer, max_steps) if spec.schedule else None

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Clip, step, advance the schedule."""
        if self._max_norm is not None:
            for node in self._nodes:
                torch.nn.utils.clip_grad_norm_(node, self._max_norm)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    @torch.no_grad()
    def heal(self, node: int, donor: int) -> None:
        """The state of one node becomes that of another."""
        for mine, theirs in zip(self._nodes[node], self._nodes[donor], strict=True):
            state = self.optimizer.state
            if theirs not in state:
                state.pop(mine, None)
                continue
            for name, value in state[theirs].items():
                copy = value.clone() if isinstance(value, Tensor) else value
                state[mine][name] = copy

    def node_state(self, node: int) -> list[dict[str, Any]]:
        """The optimizer's state of one node, by parameter; not a copy."""
        return [dict(self.optimizer.state.get(p, {})) for p in self._nodes[node]]

    def state_dict(self) -> dict[str, Any]:
        """Of all nodes, with the schedule."""
        schedule = self.schedule.state_dict() if self.schedule else None
        return {"optimizer": self.optimizer.state_dict(), "schedule": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
