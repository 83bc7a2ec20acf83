"""What all strategies by name share: their settings, and the arguments of the inner step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from torchft.errors import SettingsError
from torchft.quantization import Codec, codec_of
from torchft.strategies.compared import check_codecs
from torchft.strategies.inner import Inner
from torchft.strategies.lr_schedule import ScheduleSpec
from torchft.strategies.optim_spec import OptimSpec, ensure_optim_spec
from torchft.strategies.recipe import Recipe
from torchft.strategies.strategy import Strategy

__all__ = [
    "OUTER",
    "Arguments",
    "Averaged",
    "Named",
    "Optim",
    "Scheduler",
    "inner_step_of",
    "one_of",
]

Optim = OptimSpec | type[torch.optim.Optimizer] | str | None
Scheduler = type[LRScheduler] | str | None
Arguments = dict[str, Any] | None

OUTER = OptimSpec(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


class Named(Strategy):
    """A strategy that knows its settings by name."""

    def __init__(self, recipes: Sequence[Recipe], inner: Inner, **settings: Any) -> None:
        super().__init__(recipes, inner=inner)
        self.settings = settings


class Averaged(Named):
    """One whose averages may be encoded."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        inner: Inner,
        *,
        codec: Codec | str | None,
        **settings: Any,
    ) -> None:
        by = None if codec is None else codec_of(codec)
        super().__init__(recipes, inner, codec=None if by is None else by.name, **settings)
        for recipe in self.recipes:
            recipe.codec = by
        check_codecs(self.recipes)


def inner_step_of(
    optim: OptimSpec, max_norm: float | None, scheduler: Scheduler, arguments: Arguments
) -> Inner:
    """The inner step of an optimizer, a gradient norm and a schedule.

    Raises:
        SettingsError: there are arguments for a schedule but no schedule.
    """
    if scheduler is not None:
        return Inner(optim, ScheduleSpec(scheduler, **(arguments or {})), max_norm)
    if arguments is not None:
        raise SettingsError("lr_scheduler_kwargs are for an lr_scheduler: give that too")
    return Inner(optim, None, max_norm)


def one_of(*, default: OptimSpec | None = None, **optims: Optim) -> OptimSpec:
    """The one optimizer that was given under one of several names, else `default`.

    Raises:
        SettingsError: more than one was given.
    """
    given = {name: value for name, value in optims.items() if value is not None}
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} name the same optimizer: give one of them")
    return ensure_optim_spec(next(iter(given.values()), None), default)
