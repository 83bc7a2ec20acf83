"""A model with everything odd, and data that follow from (node, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Breaks", "Tiny", "backward", "digest", "flat"]


class Tiny(nn.Module):
    """Odd sizes, a tied weight, a parameter that nobody uses, a frozen one, a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7))
        self.second = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
        self.second[0].weight = self.first[2].weight
        self.first.unused = nn.Parameter(torch.ones(3))
        self.second.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first[2](self.first[1](self.first[0](x)))
        return self.second[2](self.second[1](self.second[0](x)))


class Breaks(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("broken")


def backward(model: nn.Module, node: int, step: int) -> None:
    """Forward and backward on the batch of `node` at `step`."""
    generator = torch.Generator().manual_seed(1000 * node + step)
    x = torch.randn(4, 5, generator=generator)
    y = torch.randn(4, 3, generator=generator)
    ((model(x) - y) ** 2).mean().backward()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements in one row."""
    return torch.cat([t.detach().reshape(-1).to(torch.float64) for t in tensors])


def digest(tree: object) -> str:
    """Equal for equal bits."""
    h = hashlib.sha256()
    _feed(h, tree)
    return h.hexdigest()


def _feed(h: hashlib._Hash, tree: object) -> None:
    if isinstance(tree, Tensor):
        h.update(tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(tree, dict):
        for key, value in tree.items():
            h.update(repr(key).encode())
            _feed(h, value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            _feed(h, value)
    else:
        h.update(repr(tree).encode())
