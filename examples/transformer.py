"""A GPT of the usual kind: pre-norm blocks, causal attention, learned positions, tied head.

A batch is (inputs, targets), both int64 `[rows, time]`; the model returns the mean loss in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GPT", "SIZES", "GPTConfig"]

SIZES = {
    "small": (4, 4, 128),
    "sbase": (8, 8, 512),
    "base": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 25, 1600),
}
"""Layers, heads, width."""


@dataclass(frozen=True)
class GPTConfig:
    """How big, and over which vocabulary."""

    block_size: int = 1024
    """Tokens seen at once."""
    vocab_size: int = 50_304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

    @classmethod
    def of_size(cls, size: str, **rest: int | float | bool) -> GPTConfig:
        """By a name in SIZES."""
        layers, heads, width = SIZES[size]
        return cls(n_layer=layers, n_head=heads, n_embd=width, **rest)  # type: ignore[arg-type]


class GPT(nn.Module):
    """(inputs, targets) → loss."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(_small_weights)
        for block in self.blocks:  # so that the stream does not grow with the depth
            for last in (block.project, block.down):
                nn.init.normal_(last.weight, std=0.02 / (2 * config.n_layer) ** 0.5)
        self.head.weight = self.tokens.weight

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())

    def logits(self, tokens: Tensor) -> Tensor:
        """`[rows, time, vocabulary]`."""
        hidden = self.drop(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, count: int, *, temperature: float = 1.0, top_k: int | None = None
    ) -> Tensor:
        """`tokens` and `count` more, drawn one by one."""
        for _ in range(count):
            logits = self.logits(tokens[:, -self.config.block_size :])[:, -1] / temperature
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, float("-inf"))
            drawn = torch.multinomial(logits.softmax(-1), 1)
            tokens = torch.cat([tokens, drawn], dim=1)
        return tokens


class Block(nn.Module):
    """Attention, then a two-layer network; each adds to the stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, bias = config.n_embd, config.bias
        self.heads, self.dropout = config.n_head, config.dropout
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.project = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.drop(self.project(self._attend(self.norm_1(hidden))))
        return hidden + self.drop(self.down(functional.gelu(self.up(self.norm_2(hidden)))))

    def _attend(self, hidden: Tensor) -> Tensor:
        rows, time, width = hidden.shape
        qkv = self.qkv(hidden).view(rows, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True
        )
        return seen.transpose(1, 2).reshape(rows, time, width)


def _small_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
