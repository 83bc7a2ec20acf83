"""The matrices of all nodes' parameters, and which of their columns a fragment is.

One matrix `[nodes, elements]` per dtype and device. Rows begin at multiples of 64 bytes, so that
what a kernel does with a row does not depend on which row it is.

A fragment of neighbours is one run of columns, and shown as a view; one in a strided pattern is
several runs, and shown as a copy that is laid out in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ColumnRange", "columns_of", "joined", "matrix", "places_of", "write"]

_ALIGNMENT = 64


@dataclass(frozen=True)
class ColumnRange:
    """The columns of the matrix in which one parameter lies."""

    matrix: int
    columns: range


def places_of(parameters: Sequence[Tensor]) -> list[ColumnRange]:
    """One after the other, each in the matrix of its dtype and device."""
    kinds: list[tuple[torch.dtype, torch.device]] = []
    filled: list[int] = []
    places = []
    for p in parameters:
        if (p.dtype, p.device) not in kinds:
            kinds.append((p.dtype, p.device))
            filled.append(0)
        kind = kinds.index((p.dtype, p.device))
        places.append(ColumnRange(kind, range(filled[kind], filled[kind] + p.numel())))
        filled[kind] += p.numel()
    return places


def columns_of(places: Sequence[ColumnRange]) -> dict[int, list[range]]:
    """Matrix → the fewest runs of columns, in order; a matrix that comes first stands first."""
    runs: dict[int, list[range]] = {}
    for place in places:
        mine = runs.setdefault(place.matrix, [])
        if mine and mine[-1].stop == place.columns.start:
            mine[-1] = range(mine[-1].start, place.columns.stop)
        else:
            mine.append(place.columns)
    return runs


def matrix(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A matrix of zeros, `[rows, size]`."""
    step = _ALIGNMENT // dtype.itemsize
    return torch.zeros(rows, -(-size // step) * step, dtype=dtype, device=device)[:, :size]


@torch.no_grad()
def joined(runs: Sequence[Tensor]) -> Tensor:
    """Views `[rows, …]` of some runs side by side: the view itself where it is one."""
    if len(runs) == 1:
        return runs[0]
    size = sum(run.shape[1] for run in runs)
    whole = matrix(runs[0].shape[0], size, runs[0].dtype, runs[0].device)
    for run, part in zip(runs, _parts(whole, runs), strict=True):
        part.copy_(run)
    return whole


@torch.no_grad()
def write(runs: Sequence[Tensor], values: Tensor, rows: Sequence[int] | None) -> None:
    """Write `[1 or rows, n]` into the runs: into some rows only, or None: into all."""
    # One row travels to another device, not a copy for each node.
    value = values.to(runs[0].device)
    for run, part in zip(runs, _parts(value, runs), strict=True):
        if rows is None:
            run.copy_(part)
            continue
        for row in rows:
            run[row].copy_(part[row if part.shape[0] > 1 else 0])


def _parts(whole: Tensor, runs: Sequence[Tensor]) -> Sequence[Tensor]:
    return whole.split([run.shape[1] for run in runs], dim=1)
