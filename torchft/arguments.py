"""Whether a value is one that can be used: a number in its range, one of a list of choices.

It is said here once, in the same words for arguments, environment variables and command lines:

    sync_every=0: it must be an integer, at least 1
    TORCHFT_TIMEOUT_SEC='soon': it must be an integer, at least 1
    argument --steps: 0: it must be an integer, at least 1
    mode='fast': it must be one of sync, async
"""

from __future__ import annotations

import argparse
import math
import operator
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, TypeVar

from torchft.errors import SettingsError

__all__ = [
    "CODECS",
    "above_zero",
    "at_least",
    "boolean_of",
    "check_choice",
    "check_integer",
    "check_number",
    "in_words",
    "integer_from",
    "number_from",
]

T = TypeVar("T")

CODECS = ("fp32", "bf16", "fp8", "int8", "int4")
"""How numbers can travel, by name; here, since command lines are read without torch."""

_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

_ENDS = {
    "above": ("above", operator.gt),
    "least": ("at least", operator.ge),
    "below": ("below", operator.lt),
    "most": ("at most", operator.le),
}


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    finite: bool = True,
    error: type[Exception] = SettingsError,
) -> None:
    """Refuse what is not a finite number between these bounds; bools are no numbers.

    With `finite=False` infinity is one too; NaN never is.

    Raises:
        SettingsError: or `error`, if it is not; names the setting, its value and the range.
    """
    ends = {"above": above, "least": least, "below": below, "most": most}
    if reason := _misfit(value, Real, finite=finite, **ends):
        raise error(f"{name}={_shown(value)}: {reason}")


def check_integer(
    name: str,
    value: object,
    *,
    least: int | None = None,
    below: int | None = None,
    most: int | None = None,
    error: type[Exception] = SettingsError,
) -> None:
    """Refuse what is not an integer between these bounds; bools are no integers.

    Raises:
        SettingsError: or `error`, if it is not; names the setting, its value and the range.
    """
    if reason := _misfit(value, Integral, least=least, below=below, most=most):
        raise error(f"{name}={_shown(value)}: {reason}")


def check_choice(name: str, value: T, choices: Iterable[object], *, otherwise: str = "") -> T:
    """The value, if it is one of `choices`; `otherwise` says in words what else there is.

    Raises:
        SettingsError: if it is none of them; lists them.
    """
    known = list(choices)
    if not any(type(value) is type(one) and value == one for one in known):
        listed = ", ".join([*map(str, known), *([f"or {otherwise}"] if otherwise else [])])
        raise SettingsError(f"{name}={_shown(value)}: it must be one of {listed}")
    return value


def in_words(value: object) -> str:
    """What was given in the place of something else, for an error: `None`, `'x'`, `the class X`, or
    `a X`."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if value is None or isinstance(value, str) else f"a {type(value).__name__}"


def boolean_of(name: str, text: str) -> bool:
    """True for 1, true or yes, False for 0, false or no, in any case.

    Raises:
        SettingsError: if `text` is anything else; lists the words.
    """
    return _BOOLEANS[check_choice(name, text.lower(), _BOOLEANS)]


def integer_from(text: str) -> object:
    """The integer that `text` is, else `text` itself, for `check_integer` to refuse."""
    try:
        return int(text)
    except ValueError:
        return text


def number_from(text: str) -> object:
    """The number that `text` is, else `text` itself, for `check_number` to refuse."""
    try:
        return float(text)
    except ValueError:
        return text


def at_least(least: int) -> Callable[[str], int]:
    """What argparse takes as `type` of an option: an integer that is not below `least`."""

    def read(typed: str) -> int:
        value = integer_from(typed)
        if reason := _misfit(value, Integral, least=least):
            raise argparse.ArgumentTypeError(f"{_shown(value)}: {reason}")
        return int(typed)

    return read


def above_zero(typed: str) -> float:
    """What argparse takes as `type` of an option that is a finite number above zero.

    Raises:
        argparse.ArgumentTypeError: if it is no such number.
    """
    value = number_from(typed)
    if reason := _misfit(value, Real, above=0):
        raise argparse.ArgumentTypeError(f"{_shown(value)}: {reason}")
    return float(typed)


def _misfit(value: Any, kind: type[Any], finite: bool = True, **ends: float | None) -> str | None:
    """What `value` must be and is not; None if it is."""
    bounds = {end: bound for end, bound in ends.items() if bound is not None}
    if isinstance(value, kind) and not isinstance(value, bool):
        bounded = isinstance(value, Integral) or math.isfinite(value) or not finite
        if bounded and all(_ENDS[end][1](value, bound) for end, bound in bounds.items()):
            return None
    endless = isinstance(value, float) and finite and not math.isfinite(value)
    what = "an integer" if kind is Integral else "a finite number" if endless else "a number"
    said = " and ".join(f"{_ENDS[end][0]} {bound:.12g}" for end, bound in bounds.items())
    return f"it must be {what}{', ' if said else ''}{said}"


def _shown(value: object) -> str:
    """The value in an error, in one line that is not too long to read."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
