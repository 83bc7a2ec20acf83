"""Whole strategies by the names and arguments of EXO Gym's scripts: a recipe, and an inner step.

    DiLoCoStrategy(OptimSpec(torch.optim.AdamW, lr=1e-3), H=20, lr_scheduler="lambda_cosine",
                   lr_scheduler_kwargs={"warmup_steps": 100, "cosine_anneal": True})

Each takes, besides what is its own:

    optim_spec, inner_optim, inner_optim_spec   three names of one thing: the inner optimizer, as an
                                                OptimSpec, a class, or a name such as "adamw"
    max_norm                                    each node's gradient is clipped to this L2 norm
    lr_scheduler, lr_scheduler_kwargs           "lambda_cosine" or a torch scheduler class

Those that average take a `codec` too, which makes what travels smaller: "bf16", "fp8", "int8",
"int4", or a `torchft.quantization.Codec`. None: every bit travels. All-reduce and DiLoCo, streaming
or beside SPARTA too, take `error_feedback` with it: what the codec loses is sent later.

Those of LocalSGD and DiLoCo take `buffers` ("left", "averaged", "copied"): what becomes of the
model's buffers in a round, see `buffers.py`.

An argument that is not listed is an error, as in any Python call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from torchft.errors import SettingsError
from torchft.quantization import Codec, codec_of
from torchft.strategies.all_reduce import AllReduce
from torchft.strategies.buffers import LEFT
from torchft.strategies.demo import DeMo
from torchft.strategies.diloco import DiLoCo
from torchft.strategies.fedavg import FedAvg
from torchft.strategies.fragments import SEQUENTIAL
from torchft.strategies.inner import Inner
from torchft.strategies.local_sgd import LocalSGD
from torchft.strategies.optim_spec import OptimSpec, ensure_optim_spec
from torchft.strategies.parts.selectors import RandomIndexSelector, Selector
from torchft.strategies.recipe import Recipe
from torchft.strategies.schedule import ScheduleSpec
from torchft.strategies.sparta import Sparta
from torchft.strategies.strategy import Strategy
from torchft.strategies.top_k import TopK

__all__ = [
    "DeMoStrategy",
    "DiLoCoStrategy",
    "FedAvgStrategy",
    "LocalSGDStrategy",
    "SPARTADiLoCoStrategy",
    "SPARTAStrategy",
    "SimpleReduceStrategy",
    "StreamingDiLoCoStrategy",
    "TopKStrategy",
]

Optim = OptimSpec | type[torch.optim.Optimizer] | str | None
Scheduler = type[LRScheduler] | str | None
Arguments = dict[str, Any] | None

OUTER = OptimSpec(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


class _Named(Strategy):
    """A strategy that knows its settings by name."""

    def __init__(self, recipes: Sequence[Recipe], inner: Inner, **settings: Any) -> None:
        super().__init__(recipes, inner=inner)
        self.settings = settings


class _Averaged(_Named):
    """One whose averages may be encoded."""

    def __init__(
        self,
        recipes: Sequence[Recipe],
        inner: Inner,
        *,
        codec: Codec | str | None,
        **settings: Any,
    ) -> None:
        by = None if codec is None else codec_of(codec)
        super().__init__(recipes, inner, codec=None if by is None else by.name, **settings)
        for recipe in self.recipes:
            recipe.codec = by
        self._check_codecs()


def _check_interval(name: str, steps: int) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise SettingsError(
            f"{name}={steps!r}: nodes synchronise every 1 or more whole inner steps"
        )


def _inner(
    optim: OptimSpec, max_norm: float | None, scheduler: Scheduler, arguments: Arguments
) -> Inner:
    if scheduler is not None:
        return Inner(optim, ScheduleSpec(scheduler, **(arguments or {})), max_norm)
    if arguments is not None:
        raise SettingsError("lr_scheduler_kwargs are for an lr_scheduler: give that too")
    return Inner(optim, None, max_norm)


def _one_of(*, default: OptimSpec | None = None, **optims: Optim) -> OptimSpec:
    given = {name: value for name, value in optims.items() if value is not None}
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} name the same optimizer: give one of them")
    return ensure_optim_spec(next(iter(given.values()), None), default)


class SimpleReduceStrategy(_Averaged):
    """Average all gradients in every step."""

    def __init__(
        self,
        optim_spec: Optim = None,
        max_norm: float | None = None,
        *,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        codec: Codec | str | None = None,
        error_feedback: bool = False,
    ) -> None:
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        super().__init__(
            [AllReduce(error_feedback=error_feedback)],
            inner,
            codec=codec,
            error_feedback=error_feedback,
        )


class FedAvgStrategy(_Averaged):
    """Average the weights every H steps, among all or within random islands of `island_size`."""

    def __init__(
        self,
        inner_optim: Optim = None,
        island_size: int | None = None,
        H: int = 1,
        max_norm: float | None = None,
        *,
        optim_spec: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        codec: Codec | str | None = None,
        seed: int = 0,
    ) -> None:
        _check_interval("H", H)
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        recipe = FedAvg(H, island_size=island_size, seed=seed, backup_device=None)
        super().__init__(
            [recipe],
            inner,
            codec=codec,
            H=H,
            island_size=island_size,
            seed=seed,
        )


class LocalSGDStrategy(_Averaged):
    """Average the weights among all every H steps; after a no they go back to the last average."""

    def __init__(
        self,
        optim_spec: Optim = None,
        H: int = 100,
        max_norm: float | None = None,
        *,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        codec: Codec | str | None = None,
        buffers: str = LEFT,
    ) -> None:
        _check_interval("H", H)
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        recipe = LocalSGD(H, buffers=buffers, backup_device=None)
        super().__init__([recipe], inner, codec=codec, buffers=buffers, H=H)


class DiLoCoStrategy(_Averaged):
    """Every H steps, exactly, an outer optimizer steps with the mean of what the nodes moved."""

    def __init__(
        self,
        optim_spec: Optim = None,
        outer_optim_spec: Optim = None,
        H: int = 100,
        max_norm: float | None = None,
        *,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        codec: Codec | str | None = None,
        buffers: str = LEFT,
        error_feedback: bool = False,
    ) -> None:
        _check_interval("H", H)
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OUTER)
        recipe = DiLoCo(
            outer, H, buffers=buffers, error_feedback=error_feedback, backup_device=None
        )
        super().__init__(
            [recipe],
            inner,
            codec=codec,
            error_feedback=error_feedback,
            buffers=buffers,
            H=H,
            outer=outer,
        )


class StreamingDiLoCoStrategy(_Averaged):
    """DiLoCo by `fragments` in turn: the k-th round closes after step ⌊kH/fragments⌋, for any H.

    Their blocks are neighbours ("sequential"), or dealt out in turn ("strided").

    It opens `fragment_sync_delay` steps before, and the average travels while they are taken; then
    w ← `fragment_update_alpha` · w + (1 - `fragment_update_alpha`) · backup.
    """

    def __init__(
        self,
        optim_spec: Optim = None,
        outer_optim_spec: Optim = None,
        H: int = 100,
        fragments: int = 4,
        max_norm: float | None = None,
        *,
        pattern: str = SEQUENTIAL,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        codec: Codec | str | None = None,
        buffers: str = LEFT,
        fragment_sync_delay: int = 0,
        fragment_update_alpha: float = 0.0,
        error_feedback: bool = False,
    ) -> None:
        _check_interval("H", H)
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OUTER)
        recipe = DiLoCo(
            outer,
            H,
            fragments=fragments,
            delay=fragment_sync_delay,
            mix=fragment_update_alpha,
            pattern=pattern,
            buffers=buffers,
            error_feedback=error_feedback,
            backup_device=None,
        )
        super().__init__(
            [recipe],
            inner,
            codec=codec,
            buffers=buffers,
            error_feedback=error_feedback,
            H=H,
            fragments=fragments,
            fragment_sync_delay=fragment_sync_delay,
            fragment_update_alpha=fragment_update_alpha,
            pattern=pattern,
            outer=outer,
        )


class SPARTAStrategy(_Averaged):
    """Average a share `p_sparta` (0.005) of the weights, at random, every `sparta_interval` steps.

    `index_selector` chooses them in another way; it stands instead of `p_sparta`.
    """

    def __init__(
        self,
        optim_spec: Optim = None,
        p_sparta: float | None = None,
        sparta_interval: int = 1,
        max_norm: float | None = None,
        *,
        index_selector: Selector | None = None,
        seed: int = 0,
        inner_optim: Optim = None,
        inner_optim_spec: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        codec: Codec | str | None = None,
    ) -> None:
        _check_interval("sparta_interval", sparta_interval)
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        selector = _selector(p_sparta, index_selector)
        recipe = Sparta(selector, sparta_interval, seed=seed)
        settings = {"index_selector": selector, "sparta_interval": sparta_interval, "seed": seed}
        super().__init__([recipe], inner, codec=codec, **settings)


class SPARTADiLoCoStrategy(_Averaged):
    """SPARTA between the rounds of DiLoCo. Where both are due, SPARTA goes first."""

    def __init__(
        self,
        inner_optim_spec: Optim = None,
        outer_optim_spec: Optim = None,
        p_sparta: float | None = None,
        sparta_interval: int = 1,
        H: int = 100,
        max_norm: float | None = None,
        *,
        index_selector: Selector | None = None,
        seed: int = 0,
        optim_spec: Optim = None,
        inner_optim: Optim = None,
        lr_scheduler: Scheduler = None,
        lr_scheduler_kwargs: Arguments = None,
        codec: Codec | str | None = None,
        error_feedback: bool = False,
    ) -> None:
        _check_interval("H", H)
        _check_interval("sparta_interval", sparta_interval)
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OUTER)
        selector = _selector(p_sparta, index_selector)
        recipes = [
            Sparta(selector, sparta_interval, seed=seed),
            DiLoCo(outer, H, backup_device=None, error_feedback=error_feedback),
        ]
        settings = {"index_selector": selector, "sparta_interval": sparta_interval, "seed": seed}
        super().__init__(
            recipes, inner, codec=codec, error_feedback=error_feedback, H=H, outer=outer, **settings
        )


def _selector(p: float | None, selector: Selector | None) -> Selector:
    if selector is None:
        return RandomIndexSelector(0.005 if p is None else p)
    if p is not None:
        raise SettingsError("index_selector says which weights: leave p_sparta out")
    return selector


class DeMoStrategy(_Named):
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
        optim = _one_of(
            default=OptimSpec(torch.optim.SGD, lr=1e-3),
            optim_spec=optim_spec,
            inner_optim=inner_optim,
            inner_optim_spec=inner_optim_spec,
        )
        decayed = _with_decay(optim, weight_decay)
        recipe = DeMo(compression_decay, compression_topk, compression_chunk, max_norm=max_norm)
        super().__init__(
            [recipe],
            _inner(decayed, None, lr_scheduler, lr_scheduler_kwargs),
            compression_decay=compression_decay,
            compression_topk=compression_topk,
            compression_chunk=compression_chunk,
            weight_decay=weight_decay,
            max_norm=max_norm,
        )


def _with_decay(optim: OptimSpec, weight_decay: float) -> OptimSpec:
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


class TopKStrategy(_Named):
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
    ) -> None:
        _check_interval("H", H)
        optim = _one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = _inner(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OptimSpec(torch.optim.SGD, lr=1.0))
        recipe = TopK(outer, H, topk=topk, chunk=chunk, decay=decay)
        settings = {"H": H, "topk": topk, "chunk": chunk, "decay": decay}
        super().__init__([recipe], inner, outer=outer, **settings)
