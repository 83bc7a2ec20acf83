"""Which nodes have weights that are not finite; an inner state that begins anew where it is so."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from torchft.finite import are_finite
from torchft.sharded import local_part
from torchft.step_hooks import state_of
from torchft.strategies.local import Fragment, Local

__all__ = ["begin_anew", "broken_rows", "reset_inner", "states_of"]


def broken_rows(local: Local, fragment: Fragment) -> list[int]:
    """The nodes, of those that are written, whose weights have NaN or infinity in them."""
    weights = local.weights(fragment)
    broken = [row for row in local.written if not are_finite(flat[row] for flat in weights)]
    local.release(weights, reusable=True)
    return broken


@torch.no_grad()
def reset_inner(local: Local, rows: Collection[int]) -> None:
    """Begin anew with the inner optimizer's state of each parameter of `rows` in which something
    is NaN or infinite.

    Raises:
        SettingsError: no optimizer with such state is known.
    """
    states = local.inner_states(local.whole)
    begin_anew(state for (row, _), state in states.items() if row in rows)


def states_of(optimizer: Any) -> Iterable[MutableMapping[str, Any]]:
    """Of each parameter, also where another optimizer is wrapped; none where none is known."""
    return list((state_of(optimizer) or {}).values())


@torch.no_grad()
def begin_anew(states: Iterable[MutableMapping[str, Any]]) -> None:
    """Zero moments and counters of each state of a parameter in which one is NaN or infinite."""
    for state in states:
        if _is_finite(state.values()):
            continue
        for name, value in state.items():
            if isinstance(value, Tensor):
                local_part(value).zero_()
            elif _is_number(value):
                state[name] = type(value)(0)


def _is_finite(values: Collection[object]) -> bool:
    tensors = (local_part(value) for value in values if isinstance(value, Tensor))
    return are_finite(tensors) and all(math.isfinite(v) for v in values if _is_number(v))  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
