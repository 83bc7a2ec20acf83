"""A learning-rate schedule to be made later: any torch scheduler, or warm-up and cosine by name.

ScheduleSpec("lambda_cosine", warmup_steps=100, cosine_anneal=True)
ScheduleSpec(torch.optim.lr_scheduler.StepLR, step_size=30)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from torchft.arguments import check_number
from torchft.errors import SettingsError
from torchft.strategies.optim_spec import check_arguments, plain

__all__ = ["LAMBDA_COSINE", "ScheduleSpec", "warmup_cosine"]

LAMBDA_COSINE = "lambda_cosine"
_FLOOR = 0.1


class ScheduleSpec:
    """`cls(optimizer, **kwargs)`, stepped after every inner step.

    With `"lambda_cosine"` the arguments are `warmup_steps` (0), `cosine_anneal` (False) and
    `max_steps` (the run's): see `warmup_cosine`.

    Raises:
        SettingsError: neither a scheduler class nor that name, or an argument it does not take.
    """

    def __init__(self, cls: type[LRScheduler] | str, **kwargs: Any) -> None:
        if isinstance(cls, str):
            if cls != LAMBDA_COSINE:
                raise SettingsError(
                    f"no schedule is called {cls!r}: use {LAMBDA_COSINE!r} or a scheduler class"
                )
            _check_shape(**kwargs)
        elif isinstance(cls, type) and issubclass(cls, LRScheduler):
            if issubclass(cls, ReduceLROnPlateau):
                raise SettingsError("ReduceLROnPlateau needs a loss, and steps have none to give")
            check_arguments(cls, kwargs)
        else:
            raise SettingsError(f"a schedule is a torch scheduler class, not {cls!r}")
        self.cls = cls
        self.kwargs = kwargs

    def build(self, optimizer: Optimizer, max_steps: int) -> LRScheduler:
        """The scheduler of a run of `max_steps` inner steps."""
        if isinstance(self.cls, str):
            shape = partial(warmup_cosine, **{"max_steps": max_steps, **self.kwargs})
            return LambdaLR(optimizer, shape)
        return self.cls(optimizer, **self.kwargs)

    @property
    def needs_max_steps(self) -> bool:
        """Whether the rate depends on how many steps the run has."""
        named = isinstance(self.cls, str) and "max_steps" not in self.kwargs
        return named and bool(self.kwargs.get("cosine_anneal"))

    @property
    def name(self) -> str:
        """Of the class, or the name itself."""
        return self.cls if isinstance(self.cls, str) else self.cls.__name__

    def config(self) -> dict[str, Any]:
        """The settings of the schedule as plain data."""
        return {"name": self.name, **{k: plain(v) for k, v in self.kwargs.items()}}

    def __repr__(self) -> str:
        return f"ScheduleSpec({self.name!r}, {self.kwargs})"


def _check_shape(**kwargs: Any) -> None:
    unknown = sorted(kwargs.keys() - {"warmup_steps", "cosine_anneal", "max_steps"})
    if unknown:
        raise SettingsError(f"{LAMBDA_COSINE} has no argument {', '.join(unknown)}")
    for name in ("warmup_steps", "max_steps"):
        check_number(name, kwargs.get(name, 0), least=0)


def warmup_cosine(
    step: int, *, max_steps: int, warmup_steps: int = 0, cosine_anneal: bool = False
) -> float:
    """The factor of the base rate at `step`, counted from 0.

    It rises in equal parts from 1 / `warmup_steps` to 1, so that no step is lost at rate 0, and
    then stays, or falls along a half cosine to a tenth at `max_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if not cosine_anneal:
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
