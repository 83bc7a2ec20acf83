"""Tensors that are cut over the ranks of a group: DTensors, of FSDP2 and tensor parallelism.

They are known by what they can do. To ask for the class, `torch.distributed.tensor` would have to
be imported, which takes longer than all of ours, and most runs have none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["is_sharded", "local_part"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank may hold only a part."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a sharded tensor, and others as they are; detached, and sharing
    storage."""
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()
