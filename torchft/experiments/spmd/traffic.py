"""Bytes that one process hands to torch.distributed, by the formulas of the usual algorithms.

    all_reduce          2(n-1)/n of the tensor      a ring
    broadcast, scatter  (n-1) times the tensor      from its source, nothing from the others
    all_gather          (n-1) times one's own part
    reduce, gather      the tensor                  from all but its destination
    reduce_scatter      (n-1)/n of the input
    send                the tensor

Only tensors count: objects, barriers and what a group exchanges when it is made do not. Inside
`counted()` the functions of the module `torch.distributed` are replaced by ones that count, so that
calls of the user's own count too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["Traffic", "counted"]


@dataclass
class Traffic:
    """The bytes that were sent since they were last read."""

    nbytes: int = 0
    """That this process sent."""
    collectives: int = 0

    def take(self) -> Traffic:
        """What there was, and begin anew."""
        taken = Traffic(self.nbytes, self.collectives)
        self.nbytes = self.collectives = 0
        return taken


def _all_reduce(size: int, rank: int, given: dict[str, Any]) -> int:
    return _nbytes(given["tensor"]) * 2 * (size - 1) // size


def _from_source(size: int, rank: int, given: dict[str, Any]) -> int:
    return _nbytes(given["tensor"]) * (size - 1) if rank == given.get("src", 0) else 0


def _to_destination(size: int, rank: int, given: dict[str, Any]) -> int:
    return 0 if rank == given.get("dst", 0) else _nbytes(given["tensor"])


def _all_gather(size: int, rank: int, given: dict[str, Any]) -> int:
    return _nbytes(given["tensor"]) * (size - 1)


def _all_gather_into(size: int, rank: int, given: dict[str, Any]) -> int:
    return _nbytes(given["input_tensor"]) * (size - 1)


def _reduce_scatter(size: int, rank: int, given: dict[str, Any]) -> int:
    return _nbytes(given["input_list" if "input_list" in given else "input"]) * (size - 1) // size


def _send(size: int, rank: int, given: dict[str, Any]) -> int:
    return _nbytes(given["tensor"])


_SENT: dict[str, Callable[[int, int, dict[str, Any]], int]] = {
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into,
    "all_reduce": _all_reduce,
    "broadcast": _from_source,
    "gather": _to_destination,
    "isend": _send,
    "reduce": _to_destination,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter,
    "scatter": _from_source,
    "send": _send,
}


def _nbytes(tensors: Tensor | Sequence[Tensor]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_nbytes(tensor) for tensor in tensors)


@contextmanager
def counted(traffic: Traffic) -> Iterator[None]:
    """Inside, what this process sends by `torch.distributed` is added to `traffic`."""
    originals = {name: getattr(dist, name) for name in _SENT}
    try:
        for name, original in originals.items():
            setattr(dist, name, _counting(original, _SENT[name], traffic))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _counting(
    original: Callable[..., Any], sent: Callable[[int, int, dict[str, Any]], int], traffic: Traffic
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def collective(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        size = dist.get_world_size(given.get("group"))
        if size > 0:  # this process is in the group
            traffic.nbytes += sent(size, dist.get_rank(), given)
            traffic.collectives += 1
        return original(*args, **options)

    return collective
