"""Settings of a run as plain data: what a logger writes, and what checkpoints compare.

Our own objects are told field by field, in full; of anyone else's only the name of the class. No
address, time or other thing that differs between two equal runs is in it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from torchft.strategies.recipe import Recipe, kind_of
from torchft.strategies.strategy import Strategy

__all__ = ["describe", "differences_in_words", "options_of", "shape_of_model"]

_DEEP = 8
_SHOWN = 4
"""Differences that an error names."""
_PLACES = {"device", "pin"}
"""Where a recipe keeps its backup, which decides nothing about numbers."""


def describe(value: object, depth: int = _DEEP) -> Any:
    """`value` as None, bool, int, float, str, lists and dicts of them."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, list | tuple | range):
        return [describe(item, depth - 1) for item in value]
    if isinstance(value, Mapping):
        return {str(name): describe(item, depth - 1) for name, item in value.items()}
    if isinstance(value, functools.partial):
        of = {"args": value.args, **value.keywords}
        return {"partial": describe(value.func), **describe(of, depth - 1)}
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return _object(value, depth)


def _object(value: object, depth: int) -> Any:
    name = type(value).__qualname__
    ours = type(value).__module__.startswith("torchft.") or isinstance(value, Recipe | Strategy)
    if not ours or depth <= 0 or not hasattr(value, "__dict__"):
        return name
    return {"class": name, **describe(_fields_of(value), depth - 1)}


def _fields_of(value: object) -> dict[str, Any]:
    return {name.lstrip("_"): item for name, item in vars(value).items()}


def shape_of_model(model: nn.Module) -> dict[str, str]:
    """Each parameter and buffer with its shape and dtype."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in named}


def options_of(strategy: Strategy) -> dict[str, Any]:
    """By name, what a strategy that is not in use yet was made with, as plain data."""
    kinds = ", ".join(kind_of(recipe) for recipe in strategy.recipes)
    options = {"strategy": kinds, "inner": describe(strategy.inner)}
    for number, recipe in enumerate(strategy.recipes):
        for name, value in _fields_of(recipe).items():
            if name not in _PLACES:
                options[f"recipes[{number}].{name}"] = describe(value)
    return options


def differences_in_words(saved: object, now: object) -> str:
    """The first places where two descriptions differ, as `place: saved → now`; empty if none do."""
    found = list(_differences(saved, now))
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def _differences(saved: object, now: object, path: str = "") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in [*saved, *(key for key in now if key not in saved)]:
            below = f"{path}.{key}" if path else str(key)
            yield from _differences(saved.get(key, "nothing"), now.get(key, "nothing"), below)
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for index, pair in enumerate(zip(saved, now, strict=True)):
            yield from _differences(*pair, f"{path}[{index}]")
    elif saved != now:
        yield f"{path}: {saved} → {now}"
