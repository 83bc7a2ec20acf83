"""How the deadlines of a job follow from each other.

    between groups   T        `timeout`: an average, a transfer of state
    inside a group   1.5 T    a vote, and the ranks' own process group (FSDP, tensor parallel)

A rank that waits for other groups keeps its own group waiting meanwhile. Were both deadlines equal,
one stalled rank would end the healthy groups too: one of their ranks gives up on the stalled one in
the moment in which the others give up on that rank. So a group waits longer for its own ranks: they
come, late by the deadline between groups, discard the step together, and go on without the other
group.
"""

from __future__ import annotations

from datetime import timedelta

__all__ = ["inside_group"]

_INSIDE = 1.5


def inside_group(between_groups: timedelta) -> timedelta:
    """The deadline of what ranks of one group wait for among themselves.

    `between_groups` is the `timeout` of the manager and its process group.
    """
    return between_groups * _INSIDE
