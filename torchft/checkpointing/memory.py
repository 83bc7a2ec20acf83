"""Leaves in memory: the sender's as byte views, the receiver's in blocks of fresh memory.

The sender copies nothing that is already contiguous. The receiver takes one anonymous mapping per
block, and asks the kernel for huge pages: faulting fresh memory in, 4 KiB at a time, takes longer
than the transfer itself (loopback: 1.3 GB/s into small pages, 3 GB/s into huge ones). The tensors
of a block keep its mapping alive between them, and the last one gives it back to the system.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchft.checkpointing.layout import DTYPES, Block, LayoutError, Leaf

__all__ = ["Checksum", "SourceLeaf", "fresh_memory", "tensors_in"]


@dataclass(frozen=True)
class SourceLeaf:
    """A leaf of a state that is being sent, where it lies."""

    leaf: Leaf
    source: Tensor | np.ndarray[Any, Any]

    def on_cpu(self) -> SourceLeaf:
        """Itself, or a copy if it lies on an accelerator."""
        if isinstance(self.source, Tensor) and self.source.device.type != "cpu":
            return SourceLeaf(self.leaf, self.source.cpu())
        return self

    def bytes(self) -> memoryview:
        """Its bytes in row-major order: a view, or a copy if it was not contiguous on the CPU."""
        if isinstance(self.source, Tensor):
            plain = self.source.cpu().resolve_conj().resolve_neg().contiguous()
            return plain.reshape(-1).view(torch.uint8).numpy().data
        return np.ascontiguousarray(self.source).reshape(-1).view(np.uint8).data


class Checksum:
    """Sum of 64-bit words, block by block; `value` is the trailer of a part."""

    def __init__(self) -> None:
        self.value = 0
        self._block = 0

    def add(self, data: memoryview) -> None:
        """Count `data`, which begins at a multiple of 8 bytes and is followed by zeros if odd."""
        whole = len(data) & ~7
        words = np.frombuffer(data[:whole], dtype="<u8")
        self._block += int(words.sum()) + int.from_bytes(data[whole:], "little")

    def end_block(self) -> None:
        """Mix the block in, so that blocks which change places are noticed."""
        self.value = (self.value * 0x9E3779B97F4A7C15 + self._block) % (1 << 64)
        self._block = 0


def fresh_memory(nbytes: int) -> memoryview:
    """Zeroed writable memory that is only backed by pages once it is written.

    Raises:
        LayoutError: the system does not give that much.
    """
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return memoryview(bytearray(nbytes))
        block = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, MemoryError, ValueError) as error:
        raise LayoutError(f"the header asks for a block of {nbytes} bytes: {error}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without huge pages refuses: it is the same memory then, slower to fault in.
        with contextlib.suppress(OSError):
            block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)[:nbytes]


def tensors_in(
    memory: memoryview, block: Block, leaves: tuple[Leaf, ...]
) -> Iterator[tuple[int, Tensor]]:
    """Index and tensor of each leaf of `block`, viewing `memory`."""
    for index, offset in zip(block.leaves, block.offsets, strict=True):
        yield index, _tensor_at(memory, offset, leaves[index])


def _tensor_at(memory: memoryview, offset: int, leaf: Leaf) -> Tensor:
    dtype, count = DTYPES[leaf.dtype], leaf.nbytes // DTYPES[leaf.dtype].itemsize
    try:
        if count == 0:
            return torch.empty(leaf.shape, dtype=dtype, device="cpu")
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(leaf.shape)
    except RuntimeError as error:
        raise LayoutError(f"no tensor of shape {leaf.shape}: {str(error)[:200]}") from None
