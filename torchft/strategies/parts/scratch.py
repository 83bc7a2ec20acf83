"""Flat tensors that a round fills and gives back, so that an outer step allocates nothing anew.

One spare is kept per dtype and device: the largest so far, which serves smaller fragments too. A
tensor that an abandoned collective may still write to is never taken again: it is simply let go.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Scratch"]

_Kind = tuple[torch.dtype, torch.device]


class Scratch:
    """Lends `[1, n]` tensors with undefined contents."""

    def __init__(self) -> None:
        self._spare: dict[_Kind, Tensor] = {}
        # By address of its first element: the storage under each tensor that is out.
        self._lent: dict[int, Tensor] = {}

    def take(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of `size` elements that nobody else holds."""
        storage = self._spare.pop((dtype, device), None)
        if storage is None or storage.numel() < size:
            storage = torch.empty(size, dtype=dtype, device=device)
        taken = storage[:size].view(1, size)
        self._lent[taken.data_ptr()] = storage
        return taken

    def release(self, tensors: Sequence[Tensor], *, reusable: bool) -> None:
        """Take back what was lent; tensors of others are passed over."""
        for tensor in tensors:
            storage = self._lent.pop(tensor.data_ptr(), None)
            if storage is None or not reusable:
                continue
            kind = (storage.dtype, storage.device)
            spare = self._spare.get(kind)
            if spare is None or spare.numel() < storage.numel():
                self._spare[kind] = storage
