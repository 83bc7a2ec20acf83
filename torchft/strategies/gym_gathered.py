"""DeMo and top-k by name, with the arguments of `gym.py`: they gather, and take no codec."""

from __future__ import annotations

import torch

from torchft.errors import SettingsError
from torchft.strategies.demo import DeMo
from torchft.strategies.named import (
    Arguments,
    Named,
    Optim,
    Scheduler,
    check_interval,
    inner_step_of,
    one_of,
)
from torchft.strategies.optim_spec import OptimSpec, ensure_optim_spec
from torchft.strategies.parts.precision import SharedDtype
from torchft.strategies.ranges import check_number
from torchft.strategies.top_k import TopK

__all__ = ["DeMoStrategy", "TopKStrategy"]


class DeMoStrategy(Named):
    """Send the largest DCT coefficients of each node's momentum; step with the sign of their mean.

    The inner optimizer is SGD with lr 1e-3 unless another is given. `weight_decay` is decoupled:
    w ← w - lr · weight_decay · w, whatever the gradient.
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
    ) -> None:
        optim = one_of(
            default=OptimSpec(torch.optim.SGD, lr=1e-3),
            optim_spec=optim_spec,
            inner_optim=inner_optim,
            inner_optim_spec=inner_optim_spec,
        )
        decayed = _with_decay(optim, weight_decay)
        recipe = DeMo(compression_decay, compression_topk, compression_chunk, max_norm=max_norm)
        super().__init__(
            [recipe],
            inner_step_of(decayed, None, lr_scheduler, lr_scheduler_kwargs),
            compression_decay=compression_decay,
            compression_topk=compression_topk,
            compression_chunk=compression_chunk,
            weight_decay=weight_decay,
            max_norm=max_norm,
        )


def _with_decay(optim: OptimSpec, weight_decay: float) -> OptimSpec:
    check_number("weight_decay", weight_decay, least=0)
    if not weight_decay:
        return optim
    if "weight_decay" in optim.kwargs:
        raise SettingsError(f"{optim!r} has a weight_decay: leave the strategy's out")
    # Plain SGD adds the decay to the gradient and steps once: that is the decoupled one.
    plain_sgd = optim.cls is torch.optim.SGD and not optim.kwargs.get("momentum")
    if not (plain_sgd or optim.cls is torch.optim.AdamW):
        raise SettingsError(
            f"weight_decay={weight_decay} would not be decoupled in {optim!r}: use SGD without "
            "momentum or AdamW, or give the optimizer its own weight_decay"
        )
    return OptimSpec(optim.cls, **optim.kwargs, weight_decay=weight_decay)


class TopKStrategy(Named):
    """DiLoCo that sends `topk` of every `chunk` numbers, and keeps the rest for later rounds.

    The outer optimizer is SGD with lr 1 unless another is given: the residual is its momentum.
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
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        check_interval("H", H)
        optim = one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = inner_step_of(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OptimSpec(torch.optim.SGD, lr=1.0))
        recipe = TopK(outer, H, topk=topk, chunk=chunk, decay=decay, shared_dtype=shared_dtype)
        settings = {
            "H": H,
            "topk": topk,
            "chunk": chunk,
            "decay": decay,
            "shared_dtype": shared_dtype,
        }
        super().__init__([recipe], inner, outer=outer, **settings)
