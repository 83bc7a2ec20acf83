"""Arguments that EXO Gym takes and never reads: left out here, said in a warning, no error.

    SPARTAStrategy(p_sparta=0.01, H=20, async_sparta_delay=0)
    UserWarning: SPARTAStrategy has no H=20, async_sparta_delay=0: left out, as EXO Gym ignores them

Only what is listed here is passed over, and a delay only where it asks for nothing; anything else
that a strategy does not know is a TypeError.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torchft.errors import SettingsError
from torchft.strategies import Strategy

__all__ = ["left_out", "tolerant"]

_ANY = object()
_HARMLESS: dict[str, tuple[object, ...]] = {
    "H": (_ANY,),
    "p": (_ANY,),
    "async_sparta_delay": (0, None),
    "device": ("", None),
}
"""Values that change nothing where the name is not known. H and p stand in scripts that make
several strategies by one call."""
_OVERRIDDEN = ("_communicate", "_init_node", "step", "zero_grad")

_S = TypeVar("_S", bound=type[Strategy])


def left_out(given: Mapping[str, Any], known: Mapping[str, object]) -> dict[str, Any]:
    """Which of the arguments `given` have no meaning for a call that takes `known`."""
    return {
        name: value
        for name, value in given.items()
        if name not in known and name in _HARMLESS and _is_harmless(value, _HARMLESS[name])
    }


def _is_harmless(value: object, harmless: tuple[object, ...]) -> bool:
    return _ANY in harmless or any(value is one or value == one for one in harmless)


def tolerant(cls: _S) -> _S:
    """Make a strategy's name take EXO Gym's arguments that say nothing.

    Its methods are not EXO Gym's, so a subclass that overrides one of those is refused when it is
    made, instead of being passed over.
    """
    parent = cls.__init__
    signature = inspect.signature(parent)

    @functools.wraps(parent)
    def __init__(self: Strategy, *args: Any, **options: Any) -> None:
        _check_own(type(self), cls)
        extra = left_out(options, signature.parameters)
        if extra:
            said = ", ".join(f"{name}={value!r}" for name, value in extra.items())
            hint = "; the share of SPARTA is p_sparta" if "p" in extra else ""
            warnings.warn(
                f"{cls.__name__} has no {said}: left out, as EXO Gym ignores them{hint}",
                UserWarning,
                stacklevel=2,
            )
        parent(self, *args, **{k: v for k, v in options.items() if k not in extra})

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def _check_own(made: type[Strategy], named: type[Strategy]) -> None:
    own = [
        name for name in _OVERRIDDEN if getattr(made, name, None) is not getattr(named, name, None)
    ]
    if own:
        raise SettingsError(
            f"{made.__name__} overrides {' and '.join(own)} of {named.__name__}, which is made of "
            "recipes that do not call that: import what it is derived from from "
            "torchft.compat.exogym.strategy.processes, or derive it from Strategy"
        )
