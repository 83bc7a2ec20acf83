"""NaN and infinity are judged on the average, which is equal everywhere, so all groups judge alike.

One pass over the values where all is well: the sum of finite numbers is finite, or has overflowed,
and only then is each looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from torchft.errors import NotFiniteError

__all__ = ["are_finite", "not_finite"]


@torch.no_grad()
def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(_is_finite(tensor) for tensor in tensors if tensor.is_floating_point())


def _is_finite(tensor: Tensor) -> bool:
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


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
