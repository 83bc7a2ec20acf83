"""The arithmetic between a node's weights w and the weights b that all nodes share.

    delta   b - w                           what the node sends
    mix     mix · w + (1 - mix) · b         what it goes on from, if it keeps a share of its own

Where w has fewer digits than b, as bf16 beside fp32, w sees b rounded to its dtype, and the delta
is measured from there. Every number stands for itself: recipes compute whole fragments with these
functions, and the worker of a parameter server one chunk after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["delta_into", "mixed", "rounding_lost"]


def delta_into(
    out: Tensor, base: Tensor, weights: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Write `base - weights` into `out`; all three have one shape, `base` and `out` one dtype.

    Args:
        weights: may lie on another device.
        dtype: of the parameters that `weights` are of; None: their own.
    """
    dtype, here = dtype or weights.dtype, weights.to(out.device)
    if dtype == out.dtype:
        return torch.sub(base, here, out=out)
    return out.copy_(base.to(dtype)).sub_(here)


def mixed(shared: Tensor, own: Tensor, mix: float) -> Tensor:
    """`mix · own + (1 - mix) · shared`, in the dtype and on the device of `shared`."""
    return torch.lerp(shared, own.to(shared.device, shared.dtype), mix)


def rounding_lost(base: Tensor, beyond: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """What of `beyond` is not seen in weights that are set to `base + beyond`, which their dtype
    rounds: `beyond` minus what the rounded weights moved by from the rounded base."""
    return beyond - (rounded(base + beyond) - rounded(base))
