"""Pictures of digits, 28 by 28: MNIST's where it is, else scikit-learn's 1 797 small ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import TensorDataset

from torchft.experiments import datasets

__all__ = ["NotThere", "Pictures", "digits", "mnist"]

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
    """Drawn from scikit-learn's: moved, in other contrasts, with noise."""
    return Pictures("scikit-learn's digits, enlarged", *datasets.digits(count, held_out))


def _scaled(images: Tensor) -> Tensor:
    return ((images.float() / 255 - MNIST_MEAN) / MNIST_SPREAD).unsqueeze(1)
