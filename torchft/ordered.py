"""The one sum over nodes whose bits do not depend on where it is done.

Floating-point sums depend on their order, and library sums change theirs with the number of rows.
Adding row by row gives the same bits for stacked rows of one process and for rows that came over
a network, as long as both take the nodes in the same order.

Over a network each member sums one chunk of the elements: `torchft.collectives` does that. What it
sends is said here too, so that a simulator counts the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["chunk_of", "ordered_bytes", "ordered_mean", "ordered_sum"]


@torch.no_grad()
def ordered_sum(rows: Tensor, which: Sequence[int] | None = None) -> Tensor:
    """`[rows, …]` → `[1, …]`, row by row in the order of `which` (default all); contiguous.

    Raises:
        ValueError: there is no row to sum.
    """
    order = range(rows.shape[0]) if which is None else which
    if not len(order):
        raise ValueError("a sum over no rows")
    first, *others = order
    total = rows[first : first + 1].clone(memory_format=torch.contiguous_format)
    for row in others:
        total.add_(rows[row : row + 1])
    return total


def ordered_mean(rows: Tensor, which: Sequence[int] | None = None) -> Tensor:
    """The same sum, divided by the number of rows that went into it."""
    count = rows.shape[0] if which is None else len(which)
    return ordered_sum(rows, which).div_(count)


def chunk_of(elements: int, members: int) -> int:
    """How many elements each of `members` sums: the last chunks may reach beyond the end."""
    return -(-elements // members)


def ordered_bytes(elements: int, element_size: int, members: int) -> int:
    """What each member sends to average a tensor: chunks to their summers, and its own to all."""
    return 2 * (members - 1) * chunk_of(elements, members) * element_size
