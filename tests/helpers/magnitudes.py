"""Numbers of every magnitude, whose sum depends on the order in which they are added."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["row_of", "rows_of"]


def row_of(rank: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor, of shape (size,), that the member `rank` brings: always the same one."""
    generator = torch.Generator().manual_seed(1000 * size + rank)
    exponents = torch.randint(-6, 7, (size,), generator=generator)
    return (torch.randn(size, generator=generator) * 2.0**exponents).to(dtype)


def rows_of(members: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What all members bring: shape (members, size)."""
    return torch.stack([row_of(rank, size, dtype) for rank in range(members)])
