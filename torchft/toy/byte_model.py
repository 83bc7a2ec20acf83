"""A language model over bytes that learns something within seconds on one CPU thread.

A transformer of the usual kind (pre-norm blocks, causal attention, learned positions), small on
purpose: with the default shape a step on 8 windows takes about 10 ms on one core. There is no
dropout, so equal weights and equal bytes give equal gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchft.arguments import check_integer
from torchft.errors import SettingsError
from torchft.toy.corpus import ByteCorpus, CorpusError, Order

__all__ = [
    "ByteCorpus",
    "ByteTransformer",
    "CorpusError",
    "Order",
    "Shape",
    "held_out_loss",
    "next_byte_loss",
]

BYTES = 256
"""The vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How big the model is. The default has 136 448 parameters."""

    context: int = 64
    """Bytes that the model sees at once."""
    width: int = 64
    """Numbers that stand for one byte."""
    heads: int = 4
    """Attention heads; they share the width."""
    layers: int = 2

    def __post_init__(self) -> None:
        for name in ("context", "width", "heads", "layers"):
            check_integer(name, getattr(self, name), least=1)
        if self.width % self.heads:
            raise SettingsError(f"{self.heads} heads do not divide a width of {self.width}")


class ByteTransformer(nn.Module):
    """int64 [batch, time ≤ context] → logits, float32 [batch, time, 256]."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        self.bytes = nn.Embedding(BYTES, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(TransformerBlock(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.logits = nn.Linear(shape.width, BYTES, bias=False)
        self.apply(_small_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.logits(self.norm(hidden))


class TransformerBlock(nn.Module):
    """Attention, then a two-layer network; each reads a normalised copy and adds to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_network = nn.LayerNorm(width)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self._attend(self.norm_attention(hidden))
        return hidden + self.network(self.norm_network(hidden))

    def _attend(self, hidden: Tensor) -> Tensor:
        batch, time, width = hidden.shape
        query, key, value = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.query_key_value(hidden).split(width, dim=-1)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(seen.transpose(1, 2).reshape(batch, time, width))


def next_byte_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte, a scalar: 5.5 for a model that knows nothing."""
    logits = model(inputs)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: ByteTransformer, corpus: ByteCorpus, rows: int = 64) -> float:
    """Mean cross-entropy in nats per byte over up to `rows` windows that nobody trains on.

    Raises:
        CorpusError: the held-out text is shorter than one window.
    """
    inputs, targets = corpus.held_out_batch(rows, context=model.shape.context)
    return next_byte_loss(model, inputs, targets).item()


def _small_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        torch.nn.init.zeros_(module.bias)
