"""Memory that a process and its child both see, and where tensors lie in it.

An operation gets one segment for all of its tensors. A segment is an anonymous file (a memfd): it
has no name in /dev/shm, and the system frees it when both processes have closed it, however they
end. Segments are used again, so that their pages exist already. Linux only.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchft.errors import SettingsError

__all__ = ["Segment", "Segments", "Slot", "mapped", "place", "view"]

_ALIGNED = 64
_LEAST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in its segment, contiguous."""

    offset: int
    """In bytes, a multiple of 64."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """One piece of shared memory, as the process sees it that made it."""

    number: int
    """Its name among the segments of one child; from 1 on, 0 stands for none."""
    memory: Tensor
    """All of its bytes."""


def place(tree: Any, offset: int) -> tuple[Any, int]:
    """Lay out the tensors of nested lists one after the other, from `offset` on.

    Returns the same lists with slots, and the offset behind them.

    Raises:
        SettingsError: a sparse tensor.
    """
    if isinstance(tree, Tensor):
        if tree.layout is not torch.strided:
            raise SettingsError(
                f"a sparse tensor of shape {tuple(tree.shape)} cannot be shared with a child "
                "process: give tensor.to_dense()"
            )
        nbytes = tree.numel() * tree.element_size()
        slot = Slot(offset, tuple(tree.shape), tree.dtype, nbytes)
        return slot, offset + -(-nbytes // _ALIGNED) * _ALIGNED
    slots = []
    for part in tree:
        slot, offset = place(part, offset)
        slots.append(slot)
    return slots, offset


def view(memory: Tensor, slot: Slot) -> Tensor:
    """The tensor that lies there, without a copy."""
    if slot.nbytes == 0:
        return torch.empty(slot.shape, dtype=slot.dtype)
    piece = memory[slot.offset : slot.offset + slot.nbytes]
    return piece.view(slot.dtype).view(slot.shape)


def mapped(descriptor: int, nbytes: int) -> Tensor:
    """The bytes of the file `descriptor`, which may be closed afterwards."""
    return torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8)


class Segments:
    """The segments that are shared with one child.

    `share(number, nbytes, descriptor)` tells the child of a new one.
    """

    def __init__(self, share: Callable[[int, int, int], None]) -> None:
        self._share = share
        self._free: list[Segment] = []
        self._made = 0
        self._changing = threading.Lock()

    def take(self, nbytes: int) -> Segment:
        """The smallest free segment that has room for `nbytes`, or else a new one."""
        with self._changing:
            fitting = [one for one in self._free if one.memory.numel() >= nbytes]
            if fitting:
                smallest = min(fitting, key=lambda one: one.memory.numel())
                self._free.remove(smallest)
                return smallest
            self._made += 1
            number = self._made
        return self._make(number, max(_LEAST_BYTES, 1 << (nbytes - 1).bit_length()))

    def give_back(self, segment: Segment) -> None:
        """The child has no more to do with what lies in it."""
        with self._changing:
            self._free.append(segment)

    def clear(self) -> None:
        """Let go of those that are free: the child is gone."""
        with self._changing:
            self._free.clear()

    def _make(self, number: int, nbytes: int) -> Segment:
        descriptor = os.memfd_create("torchft", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, nbytes)
            memory = mapped(descriptor, nbytes)
            self._share(number, nbytes, descriptor)
        finally:
            os.close(descriptor)
        return Segment(number, memory)
