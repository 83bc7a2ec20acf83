"""DeMo and top-k by name, with the arguments of `gym.py`: they gather, and take no codec."""

from __future__ import annotations

from typing import Any

import torch

from torchft.arguments import check_integer, check_number
from torchft.errors import SettingsError
from torchft.strategies.demo import DeMoRecipe
from torchft.strategies.named import (
    Arguments,
    Named,
    Optim,
    Scheduler,
    inner_step_of,
    one_of,
)
from torchft.strategies.optim_spec import OptimSpec, ensure_optim_spec
from torchft.strategies.parts.chunks import MODEL
from torchft.strategies.parts.largest import SENDERS
from torchft.strategies.parts.precision import SharedDtype
from torchft.strategies.top_k import TopKRecipe

__all__ = ["DeMoStrategy", "TopKStrategy"]


class DeMoStrategy(Named):
    """Send the largest DCT coefficients of each node's momentum; step with the sign of their mean.

    The inner optimizer is SGD with lr 1e-3, unless plain SGD with another one is given; any other
    optimizer is refused, since it would take the signs for gradients. `weight_decay` is decoupled:
    w ← w - lr · weight_decay · w. `mean_over`: see `demo.py`.
    """

    def __init__(
        self,
        compression_decay: float = 0.999,
        compression_topk: int = 32,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        *,
        optim_spec: Optim = None,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        mean_over: str = SENDERS,
    ) -> None:
        optim = one_of(
            default=OptimSpec(torch.optim.SGD, lr=1e-3),
            optim_spec=optim_spec,
            inner_optim=inner_optim,
            inner_optim_spec=inner_optim_spec,
        )
        decayed = _with_decay(optim, weight_decay)
        recipe = DeMoRecipe(
            compression_decay,
            compression_topk,
            compression_chunk,
            max_norm=max_norm,
            mean_over=mean_over,
        )
        super().__init__(
            [recipe],
            inner_step_of(decayed, None, lr_scheduler, lr_scheduler_kwargs),
            compression_decay=compression_decay,
            compression_topk=compression_topk,
            compression_chunk=compression_chunk,
            weight_decay=weight_decay,
            max_norm=max_norm,
            mean_over=mean_over,
        )


def _with_decay(optim: OptimSpec, weight_decay: float) -> OptimSpec:
    check_number("weight_decay", weight_decay, least=0)
    if not weight_decay:
        return optim
    if "weight_decay" in optim.kwargs:
        raise SettingsError(f"{optim!r} has a weight_decay: leave the strategy's out")
    # Plain SGD adds the decay to the gradient and steps once: that is the decoupled one.
    return OptimSpec(optim.cls, **optim.kwargs, weight_decay=weight_decay)


class TopKStrategy(Named):
    """DiLoCo that sends `topk` of every `chunk` numbers, and keeps the rest for later rounds.

    The outer optimizer is SGD with lr 1 unless another is given: the residual is its momentum.
    `mean_over` and `chunks_of`: see `top_k.py`.
    """

    def __init__(
        self,
        optim_spec: Optim = None,
        outer_optim_spec: Optim = None,
        H: int = 100,
        topk: int = 64,
        chunk: int = 4096,
        decay: float = 0.95,
        max_norm: float | None = None,
        *,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        mean_over: str = SENDERS,
        chunks_of: str = MODEL,
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        check_integer("H", H, least=1)
        optim = one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = inner_step_of(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OptimSpec(torch.optim.SGD, lr=1.0))
        options: dict[str, Any] = {
            "topk": topk,
            "chunk": chunk,
            "decay": decay,
            "mean_over": mean_over,
            "chunks_of": chunks_of,
            "shared_dtype": shared_dtype,
        }
        super().__init__(
            [TopKRecipe(outer, H, **options)], inner, outer_optimizer=outer, H=H, **options
        )
