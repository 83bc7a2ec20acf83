"""A model and data for sweeps that end within milliseconds, and some that never should have run."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torchft.strategies import OptimSpec, SimpleReduceStrategy, Strategy

__all__ = ["TINY", "Line", "bad_pair", "data", "killed", "noisy", "not_a_strategy", "raising"]

TINY = {
    "model": "tests.helpers.sweeps:Line",
    "data": "tests.helpers.sweeps:data",
    "strategies": ["all_reduce", "diloco"],
    "nodes": [2],
    "sync_every": [4],
    "steps": 12,
    "batch_size": 4,
    "validate_every": 5,
}
"""A configuration."""


class Line(nn.Module):
    """y = w x"""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return ((self.layer(x) - y) ** 2).mean()


def data(rows: int = 64) -> tuple[TensorDataset, TensorDataset]:
    """Noise around a line."""
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(rows + 16, 3, generator=dice)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(rows + 16, 1, generator=dice)
    return TensorDataset(x[:rows], y[:rows]), TensorDataset(x[rows:], y[rows:])


def bad_pair() -> list[int]:
    """No pair of data sets."""
    return [1, 2, 3]


def not_a_strategy() -> int:
    """No strategy."""
    return 1


class _Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: list[Tensor]) -> Tensor:
        raise RuntimeError("the model is broken")


def raising() -> nn.Module:
    """A model that fails in its first step."""
    return _Raises()


def noisy(optim_spec: object = None, max_norm: object = None) -> Strategy:
    """One that cannot converge: its steps are too large for a number."""
    return SimpleReduceStrategy(OptimSpec(torch.optim.SGD, lr=1e30))


class _Killed(SimpleReduceStrategy):
    def begin(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def killed(optim_spec: object = None, max_norm: object = None) -> Strategy:
    """One whose process is killed when it begins."""
    return _Killed()
