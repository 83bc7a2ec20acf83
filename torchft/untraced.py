"""Functions that `torch.compile` calls as they are, instead of tracing into them.

Hooks that form quorums, wait for other groups or take locks cannot be part of a graph, and what a
trace of them would record is wrong in the next step. Marked, they end the graph and run as always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["untraced"]

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which is no bound method, and all that it calls, outside of any graph.

    The first call loads dynamo, which takes seconds. It is for functions that run beside a torch
    optimizer, since making one has loaded it.
    """
    # `torch.compiler.disable` would load dynamo here.
    marked: Callable[P, R] = torch._disable_dynamo(function)
    return marked
