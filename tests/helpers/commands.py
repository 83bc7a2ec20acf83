"""Commands that are watched from outside, as people run them."""

from __future__ import annotations

from torchft.launch.processes import is_dead, tree

__all__ = ["is_there"]


def is_there(pid: int) -> bool:
    """Whether there is such a process, which is not a zombie."""
    return not all(map(is_dead, tree(pid)[:1]))
