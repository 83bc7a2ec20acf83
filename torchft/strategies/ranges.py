"""Whether a setting is a number of the range that it must be in, said in one way."""

from __future__ import annotations

import math
from numbers import Integral, Real

from torchft.errors import SettingsError

__all__ = ["check_number"]


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    whole: bool = False,
) -> None:
    """`value` is a finite number, or a whole one, between these bounds.

    Raises:
        SettingsError: it is not; names the setting, its value and the range.
    """
    if isinstance(value, Integral if whole else Real) and not isinstance(value, bool):
        number = float(value)
        fits = math.isfinite(number) and (above is None or number > above)
        fits = fits and (least is None or number >= least) and (most is None or number <= most)
        if fits and (below is None or number < below):
            return
    ends = {"above": above, "at least": least, "below": below, "at most": most}
    bounds = " and ".join(f"{word} {bound:g}" for word, bound in ends.items() if bound is not None)
    what = "a whole number" if whole else "a number"
    raise SettingsError(f"{name}={value!r}: it must be {what}{' ' if bounds else ''}{bounds}")
