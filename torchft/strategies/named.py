"""What all strategies by name share: their settings, and the arguments of the inner step."""

from __future__ import annotations

from dataclasses import dataclass, fields
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

_OF_INNER = {"optim_spec", "inner_optim", "inner_optim_spec", "lr_scheduler", "lr_scheduler_kwargs"}
_NOT_TOLD = {*_OF_INNER, "max_norm", "p_sparta"}
"""Fields that `config` tells as those of the inner step, or by another field."""


class _Clipped(Strategy):
    max_norm: float | None
    """Each node's gradient is clipped to this L2 norm."""


@dataclass(kw_only=True, eq=False, repr=False)
class Named(_Clipped):
    """A strategy that is made of its settings, which are its fields.

    Afterwards they are what was meant: of several names of one thing one is left, and a default
    that depends on others stands there.
    """

    optim_spec: Optim = None
    inner_optim: Optim = None
    inner_optim_spec: Optim = None
    lr_scheduler: Scheduler = None
    lr_scheduler_kwargs: Arguments = None

    def __post_init__(self) -> None:
        inner = self._inner_step()
        super().__init__(self._recipes(), inner=inner)
        self.optim_spec, self.inner_optim, self.inner_optim_spec = inner.optim, None, None
        self.settings = self._settings()

    def _recipes(self) -> list[Recipe]:
        raise NotImplementedError

    def _inner_step(self) -> Inner:
        optim = self._inner_optim()
        return inner_step_of(optim, self.max_norm, self.lr_scheduler, self.lr_scheduler_kwargs)

    def _inner_optim(self, default: OptimSpec | None = None) -> OptimSpec:
        return one_of(
            default=default,
            optim_spec=self.optim_spec,
            inner_optim=self.inner_optim,
            inner_optim_spec=self.inner_optim_spec,
        )

    def _settings(self) -> dict[str, Any]:
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_TOLD}
        if "outer_optim_spec" in told:
            told["outer_optimizer"] = told.pop("outer_optim_spec")
        return told


@dataclass(kw_only=True, eq=False, repr=False)
class Averaged(Named):
    """A strategy by name whose averages may be encoded."""

    codec: Codec | str | None = None

    def __post_init__(self) -> None:
        codec = None if self.codec is None else codec_of(self.codec)
        self.codec = codec
        super().__post_init__()
        self.settings["codec"] = None if codec is None else codec.name
        for recipe in self.recipes:
            recipe.codec = codec
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
