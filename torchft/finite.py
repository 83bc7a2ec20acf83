"""NaN and infinity are judged on the average, which is equal everywhere, so all groups judge alike.

    finite = divide(total, 3)          # in place, with the bits of `div_`

On the CPU a chunk is divided and then summed while it is in the cache, so the judgement costs at
most one read: a sum of finite numbers is finite, or has overflowed, and only then is each looked
at. On other devices the answer is a tensor there, which is read when somebody asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from torchft.errors import NotFiniteError

__all__ = ["are_finite", "divide", "not_finite"]

_CHUNK = 1 << 20
"""Elements that are divided and then judged: 4 MiB of fp32. Smaller ones cost more calls."""


@torch.no_grad()
def divide(tensor: Tensor, divisor: int = 1) -> bool | Tensor:
    """Divide `tensor` by `divisor`, in place, and judge it.

    Args:
        tensor: of any shape; integers are never divided by another number than 1.

    Returns:
        Whether all of it is finite. Off the CPU a boolean tensor `[]` on its device, so that
        nobody waits for it here. Integers are finite.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    if tensor.device.type != "cpu":
        whole = tensor if divisor == 1 else tensor.div_(divisor)
        numbers = torch.view_as_real(whole) if whole.is_complex() else whole
        return torch.linalg.vector_norm(numbers, torch.inf, dtype=_wide(numbers.dtype)).isfinite()
    total = 0.0
    for piece in _pieces(tensor):
        if divisor != 1:
            piece.div_(divisor)
        total += _sum(piece)
    return math.isfinite(total) or bool(tensor.isfinite().all())


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    if tensor.numel() <= _CHUNK or not tensor.is_contiguous():
        return (tensor,)
    return tensor.view(-1).split(_CHUNK)


def _sum(tensor: Tensor) -> float:
    """Of all numbers, in at least 32 bits; of both parts of complex ones."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return float(numbers.sum(dtype=_wide(numbers.dtype)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is NaN or infinite. Waits for the device."""
    return all(bool(divide(tensor)) for tensor in tensors)


@torch.no_grad()
def not_finite(named: Mapping[str, Tensor]) -> NotFiniteError:
    """What is wrong with an average, by the names of its parts."""
    bad = {name: int((~values.isfinite()).sum()) for name, values in named.items()}
    first = next((name for name, count in bad.items() if count), "none")
    return NotFiniteError(
        f"the average of the groups has {sum(bad.values())} values that are NaN or infinite, "
        f"{bad.get(first, 0)} of them in {first}, the first: lower the learning rate, clip "
        "gradients, or look for the group whose data or hardware is broken"
    )
