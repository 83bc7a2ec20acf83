"""Data sets that are awkward: with chance in them, and with a sample that cannot be read."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.utils.data import Dataset

__all__ = ["Fails", "Samples"]


class Samples(Dataset[Any]):
    """One sample at a time, with a random part."""

    def __len__(self) -> int:
        return 25

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"i": i, "noise": random.random() + torch.rand(()).item()}


class Fails(Dataset[Any]):
    """64 equal samples, of which number 11 cannot be read."""

    def __init__(self, *sample: Any) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 64

    def __getitem__(self, at: int) -> Any:
        if at == 11:
            raise KeyError("image")
        return self.sample
