"""What groups must agree on of an optimizer, by the names of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchft.step_hooks import state_of

__all__ = ["optimizer_state"]


def optimizer_state(
    optimizer: Any, names: Mapping[int, str] | None = None
) -> Iterator[tuple[str, Any]]:
    """State and options of an optimizer: `("exp_avg of 0.weight", tensor)`, `("lr of group 0", …)`.

    Args:
        optimizer: has param_groups.
        names: of the parameters that count, by identity. None: all of them do, and are among what
            is returned.
    """
    states = state_of(optimizer) or {}
    for number, group in enumerate(optimizer.param_groups):
        for key in sorted(group.keys() - {"params", "param_names"}):
            yield f"{key} of group {number}", group[key]
        for position, parameter in enumerate(group["params"]):
            name = f"parameter {position} of group {number}"
            if names is None:
                yield name, parameter
            elif id(parameter) in names:
                name = names[id(parameter)]
            else:
                continue
            for key, value in states.get(parameter, {}).items():
                yield f"{key} of {name}", value
