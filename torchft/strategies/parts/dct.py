"""Parameters cut into blocks, and the blocks' discrete cosine transform.

A parameter is seen as a matrix (its first side by all others; a vector is one line), and the matrix
as blocks h x w, where h and w are the largest divisors of its sides that are not above a limit.
Blocks of one shape lie together, whichever parameter they are of. With a limit of 8:

    [10, 16]           2 x 2 blocks of 5 x 8
    [16, 3, 3, 3]      [16, 27]: 2 x 9 blocks of 8 x 3
    [12]               2 blocks of 1 x 6

The transform is the orthonormal DCT-II along both sides: X = Ch' x Cw, and back x = Ch X Cw', with
C[n, j] = sqrt((1 if j = 0 else 2) / N) cos(π (2n + 1) j / 2N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Blocks", "basis", "block_side", "dct", "inverse_dct"]


def block_side(side: int, limit: int) -> int:
    """The largest divisor of `side` that is not above `limit`."""
    return max(d for d in range(1, min(side, limit) + 1) if side % d == 0)


@lru_cache(maxsize=256)
def basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """C: orthonormal, a cosine in each column; what should be zero is exactly zero."""
    rows = [[_cosine((2 * n + 1) * j, size) for j in range(size)] for n in range(size)]
    columns = torch.tensor(rows, dtype=torch.float64, device="cpu") * math.sqrt(2 / size)
    columns[:, 0] = math.sqrt(1 / size)
    return columns.to(device, dtype)


def _cosine(turns: int, size: int) -> float:
    quarter = turns % (4 * size)
    # A rounding error here would become the sign of a gradient that is zero.
    return 0.0 if quarter % (2 * size) == size else math.cos(math.pi * quarter / (2 * size))


def dct(x: Tensor) -> Tensor:
    """Of each block, `[m, h, w]` → `[m, h, w]`."""
    return _both_sides(x, lambda c: c)


def inverse_dct(x: Tensor) -> Tensor:
    """The inverse of the discrete cosine transform above."""
    return _both_sides(x, lambda c: c.T)


def _both_sides(x: Tensor, way: Callable[[Tensor], Tensor]) -> Tensor:
    m, h, w = x.shape
    if w > 1:
        x = (x.reshape(m * h, w) @ way(basis(w, x.dtype, x.device))).view(m, h, w)
    if h > 1:
        x = torch.bmm(way(basis(h, x.dtype, x.device)).T.expand(m, h, h), x)
    return x


@dataclass
class _Group:
    """Blocks of one shape, dtype and device."""

    side: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    members: list[tuple[int, int, int]] = field(default_factory=list)
    """Position of the parameter; how many blocks lie one below, and one beside the other."""

    @property
    def count(self) -> int:
        return sum(down * across for _, down, across in self.members)


class Blocks:
    """How parameters, given as `[rows, *shape]`, are cut. Half precision is computed in float32."""

    def __init__(self, parameters: Sequence[Tensor], limit: int) -> None:
        groups: dict[object, _Group] = {}
        for position, parameter in enumerate(parameters):
            if not parameter.numel():
                continue
            height, width = _matrix(parameter.shape[1:])
            h, w = block_side(height, limit), block_side(width, limit)
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            group = _Group((h, w), dtype, parameter.device)
            group = groups.setdefault((h, w, dtype, parameter.device), group)
            group.members.append((position, height // h, width // w))
        self.groups = list(groups.values())

    def zeros(self, rows: int) -> list[Tensor]:
        """`[rows, m, h * w]` for each group of m blocks."""
        return [
            torch.zeros(rows, g.count, g.side[0] * g.side[1], dtype=g.dtype, device=g.device)
            for g in self.groups
        ]

    def cut(self, parameters: Sequence[Tensor], row: int) -> list[Tensor]:
        """One row's blocks `[m, h, w]`, in memory of their own: what is computed from them does
        not depend on where the row lies among others."""
        out = []
        for group in self.groups:
            blocks = torch.empty(group.count, *group.side, dtype=group.dtype, device=group.device)
            for part, matrix in self._members(group, blocks, parameters, row):
                part.copy_(matrix)
            out.append(blocks)
        return out

    def join(self, blocks: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Write blocks `[m, h, w]` into the first row of `parameters`."""
        for group, values in zip(self.groups, blocks, strict=True):
            for part, matrix in self._members(group, values, parameters, 0):
                matrix.copy_(part)

    def _members(
        self, group: _Group, blocks: Tensor, parameters: Sequence[Tensor], row: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each parameter: its blocks, and the same elements where they lie."""
        (h, w), start = group.side, 0
        for position, down, across in group.members:
            stop = start + down * across
            matrix = parameters[position][row].view(down, h, across, w).transpose(1, 2)
            yield blocks[start:stop].view(down, across, h, w), matrix
            start = stop


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
