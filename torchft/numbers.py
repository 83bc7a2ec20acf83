"""Numbers on a command line, with their range in the error: `--steps 0: must be at least 1`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["at_least", "seconds"]


def at_least(least: int) -> Callable[[str], int]:
    """A whole number that is not below `least`."""

    def number(typed: str) -> int:
        try:
            value = int(typed)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{typed!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least {least}")
        return value

    return number


def seconds(typed: str) -> float:
    """A time above zero."""
    try:
        value = float(typed)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{typed!r} is not a number of seconds") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{typed} s is no length of time: it must be above 0")
    return value
