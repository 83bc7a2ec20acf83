"""How each node takes its inner step: clip, optimizer, schedule.

The optimizer sees one contiguous tensor per node and parameter, in every runtime, so that a node's
bits do not depend on how many others live in its process. Where it is a fused kernel that is seen
not to couple tensors (`parts/coupling.py`), one call steps all nodes; any other optimizer may keep
a norm or a step size over all that it has, so each node gets one of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchft.arguments import check_number
from torchft.errors import SettingsError
from torchft.strategies.lr_schedule import ScheduleSpec
from torchft.strategies.optim_spec import OptimSpec
from torchft.strategies.parts.coupling import check_steps, couples_nodes

__all__ = ["Inner", "InnerOptimizer"]


@dataclass(frozen=True)
class Inner:
    """The recipe of the inner step."""

    optim: OptimSpec = field(default_factory=OptimSpec)
    schedule: ScheduleSpec | None = None
    max_norm: float | None = None
    """Each node's gradient is clipped to this L2 norm."""

    def __post_init__(self) -> None:
        if self.max_norm is not None:
            check_number("max_norm", self.max_norm, above=0)

    def config(self) -> dict[str, Any]:
        """The settings of the inner step as plain data."""
        schedule = self.schedule.config() if self.schedule is not None else None
        return {"optim": self.optim.config(), "schedule": schedule, "max_norm": self.max_norm}

    def check_given(self, optimizer: Optimizer) -> None:
        """An optimizer that somebody made does what these settings say.

        Raises:
            SettingsError: it is another one, or would leave out clipping or the schedule.
        """
        given = OptimSpec.of(optimizer)
        options = self.optim.kwargs.items()
        if given.cls is not self.optim.cls or any(given.kwargs.get(k) != v for k, v in options):
            raise SettingsError(
                f"the strategy steps by {self.optim!r}, and the optimizer that was given is "
                f"{given!r}: give None in its place to have the strategy's made, or make the "
                "strategy with that one"
            )
        if self.schedule is not None or self.max_norm is not None:
            raise SettingsError(
                "the strategy clips gradients or schedules the learning rate, which the optimizer "
                "that was given does not: give None in its place to have the strategy's made"
            )

    def try_out(self, device: torch.device) -> None:
        """Step a small matrix once, and the schedule.

        Raises:
            SettingsError: the optimizer or the schedule cannot, by the kind of its arguments.
        """
        check_steps("the inner optimizer", self.optim.build, device)
        if self.schedule is None:
            return
        parameter = nn.Parameter(torch.ones(2, 2, device=device))
        parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer = self.optim.build([parameter])
        except SettingsError:
            return  # the model's own parameters may do
        try:
            schedule = self.schedule.build(optimizer, 1)
            optimizer.step()
            schedule.step()
        except TypeError as error:
            raise SettingsError(f"{self.schedule!r} cannot step: {error}") from error
        except Exception:
            return  # of a matrix like this: a run says what it thinks of its own

    def build(self, nodes: Sequence[Sequence[nn.Parameter]], max_steps: int) -> InnerOptimizer:
        """For the parameters of each node that lives here.

        Raises:
            SettingsError: a parameter is not contiguous; fused kernels would spoil it.
        """
        return InnerOptimizer(self, nodes, max_steps)


@dataclass(frozen=True)
class _Stepper:
    """An optimizer, over the parameters of one node or of all, and its schedule."""

    optimizer: Optimizer
    schedule: LRScheduler | None

    def step(self) -> None:
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        schedule = self.schedule.state_dict() if self.schedule else None
        return {"optimizer": self.optimizer.state_dict(), "schedule": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])


class InnerOptimizer:
    """The inner optimizer of all nodes of one process: one for all, or one for each."""

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
        self._steppers = self._made(spec, max_steps)

    def _made(self, spec: Inner, max_steps: int) -> list[_Stepper]:
        """For each node; the same object for all of them where one may step all."""

        def stepper(parameters: list[nn.Parameter]) -> _Stepper:
            optimizer = spec.optim.build(parameters)
            schedule = spec.schedule.build(optimizer, max_steps) if spec.schedule else None
            return _Stepper(optimizer, schedule)

        together = stepper([p for node in self._nodes for p in node])
        if len(self._nodes) == 1 or _may_step_all(spec.optim, together.optimizer):
            return [together] * len(self._nodes)
        return [stepper(node) for node in self._nodes]

    @property
    def is_shared(self) -> bool:
        """Whether one optimizer steps all nodes."""
        return all(one is self._steppers[0] for one in self._steppers)

    @property
    def optimizer(self) -> Optimizer:
        """The first node's; maybe that of all."""
        return self._steppers[0].optimizer

    @property
    def lr(self) -> float:
        """The first node's rate in the next step."""
        return self.lr_of(0)

    def lr_of(self, node: int) -> float:
        """One node's rate in the next step."""
        return float(self._steppers[node].optimizer.param_groups[0]["lr"])

    def step(
        self, nodes: Sequence[int] | None = None, *, on_turn: Callable[[int], None] | None = None
    ) -> None:
        """Clip, step, advance the schedule, of these nodes or of all.

        Args:
            nodes: those that live. The others have no gradients.
            on_turn: called with each node before its own optimizer steps; not at all where one
                steps all nodes.
        """
        living = range(len(self._nodes)) if nodes is None else nodes
        if self._max_norm is not None:
            for node in living:
                torch.nn.utils.clip_grad_norm_(self._nodes[node], self._max_norm)
        if self.is_shared:
            self._steppers[0].step()
            return
        for node in living:
            if on_turn is not None:
                on_turn(node)
            self._steppers[node].step()

    @torch.no_grad()
    def heal(self, node: int, donor: int) -> None:
        """The state of one node becomes that of another."""
        if not self.is_shared:
            self._steppers[node].load_state_dict(copy.deepcopy(self._steppers[donor].state_dict()))
            return
        state = self.optimizer.state
        for mine, theirs in zip(self._nodes[node], self._nodes[donor], strict=True):
            if theirs not in state:
                state.pop(mine, None)
                continue
            for name, value in state[theirs].items():
                copied = value.clone() if isinstance(value, Tensor) else value
                state[mine][name] = copied

    def state_of(self, node: int) -> MutableMapping[Tensor, dict[str, Any]]:
        """By parameter, of one node and maybe of others: the optimizer's own, to be written in."""
        return self._steppers[node].optimizer.state

    def node_state(self, node: int) -> list[dict[str, Any]]:
        """The optimizer's state of one node, by parameter; not a copy."""
        return [dict(self.state_of(node).get(p, {})) for p in self._nodes[node]]

    def state_dict(self) -> dict[str, Any]:
        """Of all nodes, with the schedule."""
        if self.is_shared:
            return self._steppers[0].state_dict()
        return {"nodes": [stepper.state_dict() for stepper in self._steppers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse.

        Raises:
            SettingsError: one optimizer stepped all nodes there, and each has its own here.
        """
        if ("nodes" in state) == self.is_shared:
            raise SettingsError(
                "the state of the inner optimizer is of another version, which had one for all "
                "nodes where there is one for each, or the other way round: train anew"
            )
        if self.is_shared:
            self._steppers[0].load_state_dict(state)
            return
        for stepper, saved in zip(self._steppers, state["nodes"], strict=True):
            stepper.load_state_dict(saved)


def _may_step_all(spec: OptimSpec, optimizer: Optimizer) -> bool:
    """Nothing but a fused kernel gains by it, and so nothing else is tried out."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    return fused and not any(couples_nodes(spec.build, device) for device in devices)
