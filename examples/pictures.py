"""Pictures of digits, 28 by 28: MNIST's where it is, else scikit-learn's 1 797 small ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

__all__ = ["NotThere", "Pictures", "digits", "mnist"]

TRAINING_DIGITS = 1_437  # of the 1 797; what is tested is drawn from the others
MNIST_MEAN, MNIST_SPREAD = 0.1307, 0.3081


class NotThere(RuntimeError):
    """MNIST is not where it should be, or cannot be fetched."""


@dataclass(frozen=True)
class Pictures:
    """float32 `[n, 1, 28, 28]` with labels 0 to 9."""

    name: str
    train: TensorDataset
    held_out: TensorDataset


def mnist(folder: Path, *, download: bool = False) -> Pictures:
    """As torchvision keeps it: the files are in `folder`/MNIST/raw.

    Raises:
        NotThere: with the reason.
    """
    from torchvision.datasets import MNIST

    try:
        parts = [MNIST(str(folder), train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise NotThere(f"no MNIST in {folder}: {error}") from error
    train, held_out = (TensorDataset(_scaled(part.data), part.targets) for part in parts)
    return Pictures(f"MNIST from {folder}", train, held_out)


def digits(count: int = 20_000, held_out: int = 2_000) -> Pictures:
    """Drawn from scikit-learn's, each at a random place; no digit serves both parts."""
    from sklearn.datasets import load_digits

    small, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    small = small.float().view(-1, 1, 8, 8) / 16
    luck = torch.Generator().manual_seed(0)
    order = torch.randperm(len(small), generator=luck)

    def drawn(base: Tensor, many: int) -> TensorDataset:
        picked = base[torch.randint(len(base), (many,), generator=luck)]
        return TensorDataset(_placed(small[picked], luck), labels[picked])

    return Pictures(
        "scikit-learn's digits, enlarged and moved",
        drawn(order[:TRAINING_DIGITS], count),
        drawn(order[TRAINING_DIGITS:], held_out),
    )


def _scaled(images: Tensor) -> Tensor:
    return ((images.float() / 255 - MNIST_MEAN) / MNIST_SPREAD).unsqueeze(1)


def _placed(small: Tensor, luck: torch.Generator) -> Tensor:
    """20 by 20, somewhere in 28 by 28."""
    large = functional.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    canvas = torch.zeros(len(small), 28, 28)
    left, top = (torch.randint(9, (len(small),), generator=luck) for _ in range(2))
    side, every = torch.arange(20), torch.arange(len(small))[:, None, None]
    canvas[every, (top[:, None] + side)[:, :, None], (left[:, None] + side)[:, None]] = large[:, 0]
    return ((canvas - MNIST_MEAN) / MNIST_SPREAD).unsqueeze(1)
