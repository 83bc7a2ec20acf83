"""Commands that are watched from outside, as people run them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torchft.launch.processes import psutil

__all__ = ["is_gone", "wait_for"]


def wait_for(what: Callable[[], bool], *, within_s: float, why: str) -> None:
    """Until it is so."""
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, f"not within {within_s} s: {why}"
        time.sleep(0.02)


def is_gone(process: Any) -> bool:
    """A `psutil.Process` that has ended."""
    ps = psutil()
    try:
        return not process.is_running() or process.status() == ps.STATUS_ZOMBIE
    except ps.NoSuchProcess:
        return True
