"""Optimizers that look at more than one number at a time, as well-known ones do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["GlobalClip", "Lars", "LateClip", "Noisy", "Prodigy", "TwoGroups"]


class Lars(Optimizer):
    """The rate of each tensor by its norm, with one trust ratio bounded over all of them."""

    def __init__(self, params: Any, lr: float = 0.05, fused: bool = False) -> None:
        super().__init__(params, {"lr": lr, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                ratio = p.norm() / (p.grad.norm() + 1e-9)
                p.add_(p.grad * ratio, alpha=-group["lr"])


class GlobalClip(Optimizer):
    """SGD whose gradient is clipped over all tensors, if their norm passes `at`."""

    def __init__(self, params: Any, lr: float = 0.05, at: float = 1.0, fused: bool = False) -> None:
        super().__init__(params, {"lr": lr, "at": at, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            having = [p for p in group["params"] if p.grad is not None]
            nn.utils.clip_grad_norm_(having, group["at"])
            for p in having:
                assert p.grad is not None
                p.add_(p.grad, alpha=-group["lr"])


class Prodigy(Optimizer):
    """A step size that is learned over all tensors, and kept with the hyperparameters."""

    def __init__(self, params: Any, lr: float = 0.1, fused: bool = False) -> None:
        super().__init__(params, {"lr": lr, "d": 1e-2, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            having = [p for p in group["params"] if p.grad is not None]
            size = sum(float(p.grad.abs().sum()) for p in having)  # type: ignore[union-attr]
            group["d"] = max(group["d"], 0.9 * group["d"] + 1e-3 * size)
            for p in having:
                assert p.grad is not None
                p.add_(p.grad.sign(), alpha=-group["lr"] * group["d"])


class LateClip(GlobalClip):
    """Clips from its tenth step on only, by a count of its own."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        self.steps = getattr(self, "steps", 0) + 1
        for group in self.param_groups:
            group["at"] = 1.0 if self.steps >= 10 else 1e30
        super().step()


class Noisy(Optimizer):
    """Langevin dynamics: SGD that adds noise."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.add_(p.grad + 0.01 * torch.randn_like(p), alpha=-group["lr"])


class TwoGroups(torch.optim.AdamW):
    """Matrices decay, vectors do not: two groups, made from what it is given."""

    def __init__(self, params: Iterable[nn.Parameter], **options: Any) -> None:
        mine = list(params)
        decayed = {"params": [p for p in mine if p.dim() > 1], "weight_decay": 0.3}
        plain = {"params": [p for p in mine if p.dim() < 2], "weight_decay": 0.0}
        super().__init__([decayed, plain], **options)
