"""Small things to train on one CPU thread, the same in every run: what simulating is measured on.

mlp    784-256-128-10 on pictures of digits, 64 a batch: 235 146 parameters, bound by memory
gpt    4 layers of width 160 on 64 bytes of text, 8 a batch: 1 327 040 parameters, by arithmetic
bytes  the zoo's gpt, 2 layers of width 64 on 64 bytes: 136 448 parameters, to learn something

The pictures are scikit-learn's digits, varied; the text is the standard library of this Python.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchft.experiments import datasets
from torchft.experiments.models import Gpt, Mlp

__all__ = ["Work", "held_out_loss", "work"]

HELD_OUT = 4_096


@dataclass(frozen=True)
class Work:
    """One model and its data, which are indexed by many rows at a time."""

    name: str
    model: Callable[[], nn.Module]
    """Takes a batch and returns its mean loss."""
    data: Callable[[], tuple[Any, Any]]
    """For training, and held out."""
    batch: int
    lr: float = 1e-3


def work(name: str, *, images: int = 60_000) -> Work:
    """`mlp`, with as many pictures to train on, `gpt` or `bytes`."""
    if name == "mlp":
        return Work("mlp", Mlp, partial(_digits, images, min(images, HELD_OUT)), batch=64)
    big = partial(Gpt, width=160, heads=5, layers=4)
    return Work(name, big if name == "gpt" else Gpt, cache(datasets.text), batch=8)


@torch.no_grad()
def held_out_loss(model: nn.Module, of: Work, *, rows: int = 2_048) -> float:
    """Mean over so many held-out rows, spread evenly, in nats."""
    _, held_out = of.data()
    chosen = torch.arange(0, len(held_out), max(1, len(held_out) // rows))[:rows]
    model.eval()
    parts = chosen.split(256)
    return sum(float(model(held_out[part])) * len(part) for part in parts) / len(chosen)


@cache
def _digits(count: int, held_out: int) -> tuple[Any, Any]:
    """Kept on disk because making them takes seconds."""
    folder = Path(tempfile.gettempdir()) / f"torchft-benchmarks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / f"varied-digits-{count}-{held_out}.pt"
    if not kept.exists():
        made = kept.with_suffix(f".{os.getpid()}")
        torch.save([data.tensors for data in datasets.digits(count, held_out)], made)
        made.replace(kept)
    train, rest = torch.load(kept, weights_only=True)
    return torch.utils.data.TensorDataset(*train), torch.utils.data.TensorDataset(*rest)
