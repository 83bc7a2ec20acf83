"""Whole strategies by the names and arguments of EXO Gym's scripts: a recipe, and an inner step.

    DiLoCoStrategy(OptimSpec(torch.optim.AdamW, lr=1e-3), H=20, lr_scheduler="lambda_cosine",
                   lr_scheduler_kwargs={"warmup_steps": 100, "cosine_anneal": True})

Each takes, besides what is its own:

    optim_spec, inner_optim, inner_optim_spec   three names of one thing: the inner optimizer, as an
                                                OptimSpec, a class, or a name such as "adamw"
    max_norm                                    each node's gradient is clipped to this L2 norm
    lr_scheduler, lr_scheduler_kwargs           "lambda_cosine" or a torch scheduler class

An argument that is not listed is an error, as in any Python call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from torchft.errors import SettingsError
from torchft.strategies.all_reduce import AllReduce
from torchft.strategies.diloco import DiLoCo
from torchft.strategies.fedavg import FedAvg
from torchft.strategies.inner import Inner
from torchft.strategies.local_sgd import LocalSGD
from torchft.strategies.optim_spec import OptimSpec, ensure_optim_spec
from torchft.strategies.recipe import Recipe
from torchft.strategies.schedule import ScheduleSpec
from torchft.strategies.strategy import Strategy

__all__ = [
    "DiLoCoStrategy",
    "FedAvgStrategy",
    "LocalSGDStrategy",
    "SimpleReduceStrategy",
    "StreamingDiLoCoStrategy",
]

Optim = OptimSpec | type[torch.optim.Optimizer] | str | None
Scheduler = type[LRScheduler] | str | None
Arguments = dict[str, Any] | None

OUTER = OptimSpec(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


class _Named(Strategy):
    """A strategy that knows its settings by name."""

    def __init__(self, recipes: Sequence[Recipe], inner: Inner, **settings: Any) -> None:
        super().__init__(recipes, inner=inner)
        self.settings = settings


def _inner(
    optim: OptimSpec, max_norm: float | None, scheduler: Scheduler, arguments: Arguments
) -> Inner:
    if scheduler is not None:
        return Inner(optim, ScheduleSpec(scheduler, **(arguments or {})), max_norm)
    if arguments is not None:
        raise SettingsError("lr_scheduler_kwargs are for an lr_scheduler: give that too")
    return Inner(optim, None, max_norm)


def _one_of(**optims: Optim) -> OptimSpec:
    given = {name: value for name, value in optims.items() if value is not None}
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} name the same optimizer: give one of them")
    return ensure_optim_spec(next(iter(given.values()), None))


class SimpleReduceStrategy(_Named):
    """Average all gradients in every step."""

    def __init__(
        self,
        optim_spec: Optim = None,
        max_norm: float | None = None,
        *,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
    ) -> None:
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        super().__init__([AllReduce()], inner)


class FedAvgStrategy(_Named):
    """Average the weights every H steps, among all or within random islands of `island_size`."""

    def __init__(
        self,
        inner_optim: Optim = None,
        island_size: int | None = None,
        H: int = 1,
        max_norm: float | None = None,
        *,
        optim_spec: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        seed: int = 0,
    ) -> None:
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        recipe = FedAvg(H, island_size=island_size, seed=seed, backup_device=None)
        super().__init__(
            [recipe],
            inner,
            H=H,
            island_size=island_size,
            seed=seed,
        )


class LocalSGDStrategy(_Named):
    """Average the weights among all every H steps; after a no they go back to the last average."""

    def __init__(
        self,
        optim_spec: Optim = None,
        H: int = 100,
        max_norm: float | None = None,
        *,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
    ) -> None:
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        recipe = LocalSGD(H, backup_device=None)
        super().__init__([recipe], inner, H=H)


class DiLoCoStrategy(_Named):
    """Every H steps, exactly, an outer optimizer steps with the mean of what the nodes moved."""

    def __init__(
        self,
        optim_spec: Optim = None,
        outer_optim_spec: Optim = None,
        H: int = 100,
        max_norm: float | None = None,
        *,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
    ) -> None:
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OUTER)
        recipe = DiLoCo(outer, H, backup_device=None)
        super().__init__([recipe], inner, H=H, outer=outer)


class StreamingDiLoCoStrategy(_Named):
    """DiLoCo by fragments: one of `fragments` synchronises every H / `fragments` steps, in turn."""

    def __init__(
        self,
        optim_spec: Optim = None,
        outer_optim_spec: Optim = None,
        H: int = 100,
        fragments: int = 4,
        max_norm: float | None = None,
        *,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
    ) -> None:
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OUTER)
        recipe = DiLoCo(outer, H, fragments=fragments, backup_device=None)
        super().__init__(
            [recipe],
            inner,
            H=H,
            fragments=fragments,
            outer=outer,
        )
