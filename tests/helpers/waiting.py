"""Waiting, with a deadline, for what only shows itself when it is looked at."""

from __future__ import annotations

from collections.abc import Callable

from torchft.retry import wait_until

__all__ = ["until"]


def until(happened: Callable[[], object], what: str, *, within_s: float = 60.0) -> None:
    """Look again and again; a test fails with `what` it waited for."""
    assert wait_until(happened, within_s, longest_s=0.01), f"not within {within_s:g} s: {what}"
