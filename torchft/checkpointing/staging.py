"""A state as it was when it was copied, while training goes on and changes it.

The memory is kept from one copy to the next: fresh memory costs more to touch than to fill. Beside
accelerators it is pinned, and all copies from them are under way at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchft.checkpointing.memory import SourceLeaf
from torchft.checkpointing.tree import encode

__all__ = ["Staged", "Staging"]


@dataclass(frozen=True)
class Staged:
    """One rank's state on the CPU, until the next copy."""

    tree: Any
    """As `torchft.checkpointing.tree` writes it."""
    leaves: list[Tensor]


class Staging:
    """Copies one state after the other into the same memory."""

    def __init__(self) -> None:
        self.staged = Staged(None, [])
        """The last copy."""

    @torch.no_grad()
    def copy(self, state: object) -> None:
        """Copy `state`; the copy before is overwritten.

        Raises:
            TypeError: a value has no plain form; the message names its place.
        """
        tree, sources = encode(state)
        tensors = [_tensor_of(source) for source in sources]
        memory = [
            _memory_for(tensor, old)
            for tensor, old in zip_longest(tensors, self.staged.leaves[: len(tensors)])
        ]
        for kept, tensor in zip(memory, tensors, strict=True):
            kept.copy_(tensor, non_blocking=kept.is_pinned())
        for device in {tensor.device for tensor in tensors}:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        self.staged = Staged(tree, memory)


def _tensor_of(source: SourceLeaf) -> Tensor:
    if isinstance(source.source, Tensor):
        return source.source
    return torch.from_numpy(np.array(source.source))  # a copy that may be written to


def _memory_for(tensor: Tensor, old: Tensor | None) -> Tensor:
    if old is not None and old.dtype == tensor.dtype and old.shape == tensor.shape:
        return old
    pinned = tensor.device.type != "cpu"
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
