"""Small things to train on one CPU thread, the same in every run: what simulating is measured on.

mlp  784-256-128-10 on pictures of digits, 64 a batch: 235 146 parameters, bound by memory
gpt  4 layers of width 160 on 64 characters of text, 8 a batch: 1 279 040 parameters, by arithmetic

The pictures are scikit-learn's 1 797 digits, enlarged, moved, and noisy; those that validate come
from digits of their own. The text is the standard library of this Python.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GPT", "MLP", "Pairs", "Work", "held_out_loss", "work"]

Pairs = tuple[Tensor, Tensor]
"""Inputs and targets, as many rows each."""

IMAGES, HELD_OUT_IMAGES = 60_000, 4_096
CHARACTERS, CONTEXT, SYMBOLS = 1_500_000, 64, 98
_TRAINING_DIGITS = 1_437  # of 1 797
_HELD_OUT_ROWS = 2_048  # that a loss is taken on


@dataclass(frozen=True)
class Work:
    """One model and its data."""

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Pairs, Pairs]]
    """For training, and held out."""
    batch: int
    lr: float = 1e-3


def held_out_loss(model: nn.Module, of: Work) -> float:
    """Mean over the held-out rows, in nats."""
    _, held_out = of.data()
    inputs, targets = (rows[:_HELD_OUT_ROWS] for rows in held_out)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        parts = zip(inputs.split(256), targets.split(256), strict=True)
        total = sum(model(part).item() * len(part[0]) for part in parts)
    model.train(was_training)
    return total / len(inputs)


# ---------------------------------------------------------------------- models: batch → mean loss


class MLP(nn.Module):
    """784-256-128-10."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(784, 256), nn.ReLU()),
            *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
        )

    def forward(self, batch: Pairs) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])


class GPT(nn.Module):
    """Pre-norm blocks, causal attention, learned positions."""

    def __init__(self, width: int = 160, layers: int = 4, heads: int = 5) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(SYMBOLS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, batch: Pairs) -> Tensor:
        hidden = self.tokens(batch[0]) + self.positions.weight
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        rows, time, width = hidden.shape
        qkv = self.qkv(self.norm_1(hidden)).view(rows, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(seen.transpose(1, 2).reshape(rows, time, width))
        return hidden + self.down(functional.gelu(self.up(self.norm_2(hidden))))


# ---------------------------------------------------------------------- data


@cache
def _digits(count: int, held_out: int) -> tuple[Pairs, Pairs]:
    """`[count, 1, 28, 28]` and labels, kept on disk because making them takes seconds."""
    kept = _folder() / f"digits-{count}-{held_out}.pt"
    if not kept.exists():
        made = kept.with_suffix(f".{os.getpid()}")
        torch.save(_draw_digits(count, held_out), made)
        made.replace(kept)
    inputs, labels, held_inputs, held_labels = torch.load(kept, weights_only=True)
    return (inputs, labels), (held_inputs, held_labels)


def _draw_digits(count: int, held_out: int) -> tuple[Tensor, ...]:
    from sklearn.datasets import load_digits

    drawn, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    drawn = drawn.float().view(-1, 1, 8, 8) / 16
    luck = torch.Generator().manual_seed(0)
    order = torch.randperm(len(drawn), generator=luck)
    base = order[:_TRAINING_DIGITS], order[_TRAINING_DIGITS:]
    made = []
    for which, many in zip(base, (count, held_out), strict=True):
        picked = which[torch.randint(len(which), (many,), generator=luck)]
        made += [_varied(drawn[picked], luck), labels[picked]]
    return tuple(made)


def _varied(small: Tensor, luck: torch.Generator) -> Tensor:
    """20 by 20 somewhere in 28 by 28, at some contrast, with noise."""
    many = len(small)
    large = functional.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    canvas = torch.zeros(many, 28, 28)
    left, top = (torch.randint(9, (many,), generator=luck) for _ in range(2))
    side = torch.arange(20)
    rows, columns = (top[:, None] + side)[:, :, None], (left[:, None] + side)[:, None, :]
    canvas[torch.arange(many)[:, None, None], rows, columns] = large[:, 0]
    contrast = 0.6 + 0.8 * torch.rand(many, 1, 1, generator=luck)
    noise = 0.3 * torch.randn(canvas.shape, generator=luck)
    return ((canvas * contrast + noise - 0.2) / 0.4).unsqueeze(1)


@cache
def _text() -> tuple[Pairs, Pairs]:
    """Windows that do not overlap; the last twentieth is held out."""
    ids = torch.tensor([_symbol(one) for one in _standard_library()])
    cut = int(len(ids) * 0.95)
    return _windows(ids[:cut]), _windows(ids[cut:])


def _standard_library() -> str:
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= CHARACTERS:
            break
    return text[:CHARACTERS]


def _symbol(character: str) -> int:
    """0 is a new line, 1 to 96 is printable, 97 all else."""
    return 0 if character == "\n" else ord(character) - 31 if 32 <= ord(character) < 127 else 97


def _windows(ids: Tensor) -> Pairs:
    many = (len(ids) - 1) // CONTEXT
    end = many * CONTEXT
    return ids[:end].view(many, CONTEXT), ids[1 : end + 1].view(many, CONTEXT)


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"torchft-benchmarks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def work(name: str, *, images: int = IMAGES) -> Work:
    """`mlp`, with as many pictures to train on, or `gpt`."""
    if name == "gpt":
        return Work("gpt", GPT, _text, batch=8)
    return Work("mlp", MLP, partial(_digits, images, min(images, HELD_OUT_IMAGES)), batch=64)
