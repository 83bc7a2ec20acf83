"""Commands that are watched from outside, as people run them."""

from __future__ import annotations

from typing import Any

from torchft.launch.processes import psutil

__all__ = ["is_gone"]


def is_gone(process: Any) -> bool:
    """A `psutil.Process` that has ended."""
    ps = psutil()
    try:
        return not process.is_running() or process.status() == ps.STATUS_ZOMBIE
    except ps.NoSuchProcess:
        return True
