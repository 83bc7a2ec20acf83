"""Process groups of both generations of torchft's interface, and how a manager drives each.

Up to 0.1.1 `configure` took four arguments, in 0.2 it takes eight.
"""

from __future__ import annotations

import inspect
from dataclasses import astuple, dataclass
from typing import Any

__all__ = ["Members", "configure"]

_FEWEST = 4
"""Arguments of `configure` up to torchft 0.1.1."""


@dataclass(frozen=True, slots=True)
class Members:
    """Those that a process group is to join, in the order of `configure`'s arguments."""

    store_addr: str
    """`host:port/prefix` of a store that serves already; the prefix is theirs alone."""
    replica_id: str
    """Names this member in errors."""
    rank: int
    world_size: int
    quorum_id: int | None = None
    group_rank: int | None = None
    """Of this process in its replica group."""
    group_world_size: int | None = None
    global_ranks: list[int] | None = None
    """Of all members, counted over the ranks of all groups, by rank."""


def configure(pg: Any, members: Members) -> None:
    """Call `pg.configure` with as many of the eight arguments as it takes.

    Raises:
        Exception: whatever `pg.configure` raises.
    """
    pg.configure(*astuple(members)[: _taken(pg.configure)])


def _taken(function: Any) -> int | None:
    """How many arguments by position it takes, of `configure`'s; None: any number."""
    kinds = [one.kind for one in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(_FEWEST, sum(kind in by_place for kind in kinds))
