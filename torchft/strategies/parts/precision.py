"""The dtype of shared state: a backup, the outer optimizer's state, what is averaged.

Weights in bf16 or fp16 have 8 or 11 significant bits: an outer step below half a unit in the last
place would vanish in them, round after round. So shared state is fp32 (master weights, as in mixed
precision training: Micikevicius et al., arXiv 1710.03740). Weights are rounded to their own dtype
once, when they are set, and what a node moved is measured from the backup rounded in that way:

    w = 1.0 in bf16; each round moves it down by one unit in the last place, 2⁻⁸; outer rate 0.3
    bf16 backup    1.0, 1.0, 1.0, …          0.3 · 2⁻⁸ is rounded away
    fp32 backup    .9988, .9977, .9965, …    .977 after 20 rounds

The dtype is `torch.promote_types` of the parameter's and of what was asked for: fp32 and fp64
parameters keep their own, at no cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.strategies.local import Fragment, Local

__all__ = [
    "SharedDtype",
    "check_shared_dtype",
    "lost_by_rounding",
    "shared_dtype_of",
    "weights_as",
    "wider_dtypes",
]

SharedDtype = torch.dtype | str | None
"""A floating-point dtype or its name, such as "float32". None: the parameter's own."""


def check_shared_dtype(given: SharedDtype) -> torch.dtype | None:
    """The dtype that is meant.

    Raises:
        SettingsError: also a ValueError; it is no floating-point dtype.
    """
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if given is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise SettingsError(
        f"shared_dtype={given!r} is no floating-point dtype: use torch.float32, or None to keep "
        "shared state in each parameter's own dtype"
    )


def shared_dtype_of(parameter: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """What the shared state of a parameter of that dtype is kept in."""
    return parameter if asked is None else torch.promote_types(parameter, asked)


def wider_dtypes(local: Local, asked: torch.dtype | None) -> str:
    """The dtypes of all shared state, in words; empty where each is the parameters' own."""
    weights = local.weights(local.whole)
    own = [w.dtype for w in weights]
    local.release(weights, reusable=True)
    shared = [shared_dtype_of(dtype, asked) for dtype in own]
    return "" if shared == own else ", ".join(str(dtype).removeprefix("torch.") for dtype in shared)


@torch.no_grad()
def weights_as(local: Local, fragment: Fragment, asked: torch.dtype | None) -> list[Tensor]:
    """`local.weights(fragment)` to be averaged, in the dtypes of shared state: `[rows, n]` each."""
    weights = local.weights(fragment)
    dtypes = [shared_dtype_of(w.dtype, asked) for w in weights]
    if dtypes == [w.dtype for w in weights]:
        return weights
    wide = [w.to(dtype, copy=True) for w, dtype in zip(weights, dtypes, strict=True)]
    local.release(weights, reusable=True)
    return wide


@torch.no_grad()
def lost_by_rounding(values: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What parameters of `dtype` that were set to `values` cannot hold of them; None: nothing."""
    if torch.promote_types(values.dtype, dtype) == dtype:
        return None
    return values - values.to(dtype).to(values.dtype)
