"""A mean that weighs each node by its samples, by way of a plain mean.

    sent        n · w, and n
    received    mean of n · w, and mean of n: their quotient is Σ n w / Σ n

Two nodes with 1 and 3 samples at 0.6 and 0.8: 1.5 / 2 = 0.75. In fp32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.quantization import Codec
from torchft.strategies.local import Local
from torchft.strategies.parts.precision import shared_dtype_of

__all__ = [
    "EQUAL",
    "SAMPLES",
    "WEIGHTINGS",
    "resolved",
    "samples_of",
    "unweighed",
    "weighed",
]

WEIGHTINGS = EQUAL, SAMPLES = "equal", "samples"


def resolved(weighting: str | None, local: Local, codec: Codec | None) -> str:
    """None is "samples" where nodes have data of their own, of whatever length, and no codec has to
    carry their number; else "equal".

    Raises:
        SettingsError: "samples" with a codec.
    """
    if weighting is None:
        return SAMPLES if local.own_data and codec is None else EQUAL
    if weighting == SAMPLES and codec is not None:
        raise SettingsError(
            f"weighting='samples' averages how many samples there are, and the codec {codec.name} "
            "would change that: leave one of them out"
        )
    return weighting


def samples_of(local: Local) -> Tensor:
    """How many each row has: fp32 `[rows, 1]`.

    Raises:
        SettingsError: nobody said, or a node has none.
    """
    if local.samples is None:
        raise SettingsError(
            "weighting='samples' needs to know how many samples each node trains on: give "
            "LocalSGD(…, samples=len(data)), or set `samples` of what the strategy is bound to"
        )
    if min(local.samples) < 1:
        raise SettingsError(f"nodes have {list(local.samples)} samples: each needs 1 or more")
    return torch.tensor(local.samples, dtype=torch.float32, device="cpu")[:, None]


@torch.no_grad()
def weighed(weights: Sequence[Tensor], samples: Tensor) -> list[Tensor]:
    """The tensors that a round averages, each times its weight."""
    wide = [w.to(shared_dtype_of(w.dtype, torch.float32)) for w in weights]
    return [*(w * samples.to(w.device) for w in wide), samples.clone()]


@torch.no_grad()
def unweighed(received: Sequence[Tensor]) -> list[Tensor]:
    """The mean, of what a round averaged."""
    *means, samples = received
    return [mean / samples.to(mean.device) for mean in means]
