"""`exogym.strategy.demo`."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from torchft import strategies
from torchft.compat.exogym.strategy.optim import OptimSpec, ensure_optim_spec
from torchft.compat.exogym.tolerance import tolerant

__all__ = ["DeMoStrategy"]


@tolerant
class DeMoStrategy(strategies.DeMoStrategy):
    """DeMo by its name in EXO Gym: see `torchft.strategies.DeMoStrategy`.

    It steps with signs, by plain SGD. Of another optimizer, which EXO Gym ignores, the learning
    rate is taken, said in a warning.
    """

    def __init__(
        self,
        compression_decay: float = 0.999,
        compression_topk: int = 32,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        *,
        optim_spec: OptimSpec | type[torch.optim.Optimizer] | str | None = None,
        inner_optim: OptimSpec | type[torch.optim.Optimizer] | str | None = None,
        inner_optim_spec: OptimSpec | type[torch.optim.Optimizer] | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            compression_decay,
            compression_topk,
            compression_chunk,
            weight_decay,
            max_norm,
            optim_spec=_as_sgd(optim_spec),
            inner_optim=_as_sgd(inner_optim),
            inner_optim_spec=_as_sgd(inner_optim_spec),
            **options,
        )


def _as_sgd(
    given: OptimSpec | type[torch.optim.Optimizer] | str | None,
) -> OptimSpec | None:
    if given is None:
        return None
    spec = ensure_optim_spec(given)
    if spec.cls is torch.optim.SGD and not spec.kwargs.keys() - {"lr"}:
        return spec
    lr = spec.kwargs.get("lr", 1e-3)
    warnings.warn(
        f"DeMoStrategy steps by SGD: of {spec!r} only lr={lr} is taken", UserWarning, stacklevel=4
    )
    return OptimSpec(torch.optim.SGD, lr=lr)
