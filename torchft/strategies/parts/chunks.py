"""How numbers are cut into chunks, of each of which a sparse recipe sends the largest.

    "model"    runs of `chunk` numbers of all parameters, one after the other; the last is filled up
    "tensor"   blocks of each parameter: a matrix in blocks of up to √chunk x √chunk whose sides
               divide its own, a vector in runs of up to √chunk (`Blocks` of dct.py)

Example, chunk = 4: a matrix of 2 x 4 and a vector of 3 are chunks of 4, 4 and 3 by "model", and two
blocks of 2 x 2 and three of 1 by "tensor".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchft.arguments import check_choice
from torchft.errors import SettingsError
from torchft.strategies.local import Fragment, Local
from torchft.strategies.parts.dct import Blocks

__all__ = ["MODEL", "TENSOR", "Chunks", "check_chunks_of", "chunks_of"]

MODEL, TENSOR = "model", "tensor"


class Chunks(Protocol):
    """A way to cut tensors into chunks, and to undo it."""

    def zeros(self, rows: int) -> list[Tensor]:
        """`[rows, m, size]` for each size and dtype of chunks."""
        ...

    def add(self, chunks: Sequence[Tensor], flats: Sequence[Tensor]) -> None:
        """Add numbers as they lie in a fragment's flat tensors `[rows, n]` to the chunks."""
        ...

    def join(self, chunks: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """`[m, size]` each → flat tensors `[1, n]`, of the sizes, dtypes and devices of `like`."""
        ...


def check_chunks_of(way: str, chunk: int) -> None:
    """Refuse a way that is neither, or a size that it cannot cut.

    Raises:
        SettingsError: also a ValueError.
    """
    check_choice("chunks_of", way, (MODEL, TENSOR))
    if way == TENSOR and math.isqrt(chunk) ** 2 != chunk:
        raise SettingsError(
            f"chunk={chunk} is no square: a tensor is cut in blocks of √chunk x √chunk, such as "
            f"{math.isqrt(chunk) ** 2}"
        )


def chunks_of(
    way: str, chunk: int, local: Local, fragment: Fragment, flats: Sequence[Tensor]
) -> Chunks:
    """That way to cut `fragment`, whose flat tensors are like `flats`, `[rows, n]` each."""
    if way == MODEL:
        return _OfTheModel(flats, chunk)
    return _OfTensors(local, fragment, flats, math.isqrt(chunk))


class _OfTheModel:
    def __init__(self, flats: Sequence[Tensor], chunk: int) -> None:
        self._kinds = [(f.shape[1], f.dtype, f.device) for f in flats]
        self._chunk = chunk

    def zeros(self, rows: int) -> list[Tensor]:
        return [
            torch.zeros(rows, -(-n // size), size, dtype=dtype, device=device)
            for n, dtype, device in self._kinds
            for size in [max(1, min(self._chunk, n))]
        ]

    def add(self, chunks: Sequence[Tensor], flats: Sequence[Tensor]) -> None:
        for held, flat in zip(chunks, flats, strict=True):
            held.flatten(1)[:, : flat.shape[1]] += flat

    def join(self, chunks: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(chunks, like, strict=True)
        return [held.view(1, -1)[:, : flat.shape[1]].contiguous() for held, flat in pairs]


class _OfTensors:
    def __init__(
        self, local: Local, fragment: Fragment, flats: Sequence[Tensor], side: int
    ) -> None:
        self._local, self._fragment = local, fragment
        self._blocks = Blocks(local.views(fragment, flats), side)

    def zeros(self, rows: int) -> list[Tensor]:
        return self._blocks.zeros(rows)

    def add(self, chunks: Sequence[Tensor], flats: Sequence[Tensor]) -> None:
        views = self._local.views(self._fragment, flats)
        for row in range(flats[0].shape[0]):
            blocks = self._blocks.cut(views, row)
            for held, block in zip(chunks, blocks, strict=True):
                held[row] += block.view(held.shape[1:])

    def join(self, chunks: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        flats = [torch.empty(1, f.shape[1], dtype=f.dtype, device=f.device) for f in like]
        groups = zip(chunks, self._blocks.groups, strict=True)
        blocks = [held.view(-1, *group.side) for held, group in groups]
        self._blocks.join(blocks, self._local.views(self._fragment, flats))
        return flats
