"""`exogym.strategy.strategy`: a strategy as a program of each process, and all-reduce by name.

    class Quantised(Strategy):
        def __init__(self, optim_spec, **kwargs):
            super().__init__(**kwargs)
            self.optim_spec = optim_spec

        def step(self):
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    rounded = torch.round(parameter.grad * 1e4).int()
                    all_reduce(rounded)
                    parameter.grad = rounded.float() / 1e4 / self.num_nodes
            self.optim.step()
            super().step()

In each step its gradients are zeroed, a batch passes forward and back, and `step` is called. Draws
of random numbers in `_init_node` and `step` are alike at all nodes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchft import strategies
from torchft.compat.exogym.strategy.optim import OptimSpec, ensure_optim_spec
from torchft.compat.exogym.tolerance import tolerant
from torchft.errors import SettingsError
from torchft.experiments.spmd.node import SPMDNode
from torchft.simulator.program import SPMDProgram
from torchft.strategies import ScheduleSpec
from torchft.strategies.describe import describe

__all__ = ["OptimSpec", "SimpleReduceStrategy", "Strategy", "ensure_optim_spec"]

_BEFORE_ALL = -1
_OF_THE_RUN = ("kwargs", "local_step", "lr_callbacks", "max_steps", "scheduler")


class Strategy(SPMDProgram):
    """What to subclass. `fit` runs it over a real process for each node.

    Args:
        lr_scheduler: "lambda_cosine" or a torch scheduler class.
        lr_scheduler_kwargs: its arguments.
        kwargs: each becomes an attribute, as `max_norm=1.0` does `self.max_norm`.

    In `step` there are `self.model`, `self.rank`, `self.num_nodes`, `self.local_step` from 0 on,
    `self.max_steps`, and `self.optim`, made of `self.optim_spec` unless `_init_node` makes it.
    """

    model: nn.Module
    rank: int
    num_nodes: int
    optim: Optimizer

    def __init__(
        self,
        lr_scheduler: type[LRScheduler] | str | None = None,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.lr_scheduler, self.lr_scheduler_kwargs = lr_scheduler, lr_scheduler_kwargs
        self.kwargs = kwargs
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.scheduler: LRScheduler | None = None
        self.lr_callbacks: list[Callable[[float], None]] = []
        """Called at node 0 with the new rate after each step of a schedule."""
        self.max_steps = 1
        self.local_step = 0

    def _init_node(self, model: nn.Module, rank: int, num_nodes: int) -> None:
        """In each process, once, before the first step."""
        self.model, self.rank, self.num_nodes = model, rank, num_nodes
        self.local_step = 0

    @abstractmethod
    def step(self) -> None:
        """Average what is to be averaged and step the optimizer; end with `super().step()`, which
        advances the schedule and `local_step`."""
        if self.scheduler is not None:
            self.scheduler.step()
            if self.rank == 0:
                for callback in self.lr_callbacks:
                    callback(float(self.scheduler.get_last_lr()[0]))
        self.local_step += 1

    def zero_grad(self) -> None:
        """Reset the gradients before the forward pass."""
        self.optim.zero_grad()

    def _setup_scheduler(self) -> None:
        """Make `self.scheduler`, of `self.optim`."""
        if self.lr_scheduler is not None:
            spec = ScheduleSpec(self.lr_scheduler, **(self.lr_scheduler_kwargs or {}))
            self.scheduler = spec.build(self.optim, self.max_steps)

    def spmd_main(self, node: SPMDNode) -> None:
        """Run the training loop of one process."""
        self.max_steps = node.total_steps
        node.seed_alike(_BEFORE_ALL)
        self._init_node(node.model, node.rank, node.num_nodes)
        self._make_optimizer()
        for step in range(node.total_steps):
            node.look_if_due(step)
            self.zero_grad()
            loss = node.backward(step)
            lr = float(self.optim.param_groups[0]["lr"])
            node.seed_alike(step)
            self.step()
            node.report(step, loss, lr)
        node.look_if_due(node.total_steps)

    def spmd_settings(self) -> dict[str, Any]:
        """What stands in `config.json`: the attributes that are plain data."""
        return {
            name: value.config() if isinstance(value, OptimSpec) else describe(value)
            for name, value in vars(self).items()
            if not name.startswith("_") and name not in _OF_THE_RUN
        }

    def _make_optimizer(self) -> None:
        """For subclasses that set `optim_spec` and leave the rest to this class."""
        if getattr(self, "optim", None) is not None:
            return
        for name in ("optim_spec", "inner_optim_spec", "inner_optim"):
            spec = getattr(self, name, None)
            if spec is not None:
                self.optim = ensure_optim_spec(spec).build(self.model)
                self._setup_scheduler()
                return
        raise SettingsError(
            f"{type(self).__name__} has no optimizer: set self.optim_spec = OptimSpec(…) in its "
            "__init__, or self.optim in its _init_node"
        )


@tolerant
class SimpleReduceStrategy(strategies.SimpleReduceStrategy):
    """All-reduce by its name in EXO Gym: see `torchft.strategies.SimpleReduceStrategy`."""
