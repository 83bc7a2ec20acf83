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

Those that share weights take `shared_dtype` (`torch.float32`): at least this is what a backup, an
outer optimizer and what travels without a codec are kept in, also where parameters are bf16 or
fp16. None: the parameters' own dtype. See `parts/precision.py`.

An argument that is not listed is an error, as in any Python call.
"""

from __future__ import annotations

import torch

from torchft.arguments import check_integer
from torchft.errors import SettingsError
from torchft.quantization import Codec
from torchft.renamed import renamed_arguments
from torchft.strategies.all_reduce import AllReduceRecipe
from torchft.strategies.buffers import LEFT
from torchft.strategies.diloco import DiLoCoRecipe
from torchft.strategies.fedavg import FedAvgRecipe
from torchft.strategies.fragments import SEQUENTIAL
from torchft.strategies.local_sgd import LocalSGDRecipe
from torchft.strategies.named import (
    OUTER,
    Arguments,
    Averaged,
    Optim,
    Scheduler,
    inner_step_of,
    one_of,
)
from torchft.strategies.optim_spec import ensure_optim_spec
from torchft.strategies.parts.precision import SharedDtype
from torchft.strategies.parts.selectors import RandomIndexSelector, Selector
from torchft.strategies.sparta import SpartaRecipe

__all__ = [
    "DiLoCoStrategy",
    "FedAvgStrategy",
    "LocalSGDStrategy",
    "SPARTADiLoCoStrategy",
    "SPARTAStrategy",
    "SimpleReduceStrategy",
    "StreamingDiLoCoStrategy",
]


class SimpleReduceStrategy(Averaged):
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
        optim = one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = inner_step_of(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        super().__init__(
            [AllReduceRecipe(error_feedback=error_feedback)],
            inner,
            codec=codec,
            error_feedback=error_feedback,
        )


class FedAvgStrategy(Averaged):
    """Average the weights every H steps, among all or within random islands of `island_size`.

    Nodes weigh "equal", or by the "samples" that each has: `weighting`, see `fedavg.py`.
    """

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
        weighting: str | None = None,
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        check_integer("H", H, least=1)
        optim = one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = inner_step_of(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        recipe = FedAvgRecipe(
            H,
            island_size=island_size,
            seed=seed,
            weighting=weighting,
            shared_dtype=shared_dtype,
            backup_device=None,
        )
        super().__init__(
            [recipe],
            inner,
            codec=codec,
            H=H,
            island_size=island_size,
            seed=seed,
            weighting=weighting,
            shared_dtype=shared_dtype,
        )


class LocalSGDStrategy(Averaged):
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
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        check_integer("H", H, least=1)
        optim = one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = inner_step_of(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        recipe = LocalSGDRecipe(H, buffers=buffers, shared_dtype=shared_dtype, backup_device=None)
        super().__init__(
            [recipe], inner, codec=codec, buffers=buffers, H=H, shared_dtype=shared_dtype
        )


class DiLoCoStrategy(Averaged):
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
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        check_integer("H", H, least=1)
        optim = one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = inner_step_of(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OUTER)
        recipe = DiLoCoRecipe(
            outer,
            H,
            buffers=buffers,
            error_feedback=error_feedback,
            shared_dtype=shared_dtype,
            backup_device=None,
        )
        super().__init__(
            [recipe],
            inner,
            codec=codec,
            error_feedback=error_feedback,
            buffers=buffers,
            H=H,
            outer_optimizer=outer,
            shared_dtype=shared_dtype,
        )


class StreamingDiLoCoStrategy(Averaged):
    """DiLoCo by `fragments` in turn: the k-th round closes after step ⌊kH/fragments⌋, for any H.

    Their blocks are neighbours ("sequential"), or dealt out in turn ("strided").

    It opens `delay` steps before, and the average travels while they are taken; then
    w ← `mix` · w + (1 - `mix`) · backup.
    """

    @renamed_arguments(fragment_sync_delay="delay", fragment_update_alpha="mix")
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
        delay: int = 0,
        mix: float = 0.0,
        error_feedback: bool = False,
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        check_integer("H", H, least=1)
        optim = one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = inner_step_of(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OUTER)
        recipe = DiLoCoRecipe(
            outer,
            H,
            fragments=fragments,
            delay=delay,
            mix=mix,
            pattern=pattern,
            buffers=buffers,
            error_feedback=error_feedback,
            shared_dtype=shared_dtype,
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
            delay=delay,
            mix=mix,
            pattern=pattern,
            outer_optimizer=outer,
            shared_dtype=shared_dtype,
        )


class SPARTAStrategy(Averaged):
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
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        check_integer("sparta_interval", sparta_interval, least=1)
        optim = one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = inner_step_of(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        selector = _selector(p_sparta, index_selector)
        recipe = SpartaRecipe(selector, sparta_interval, seed=seed, shared_dtype=shared_dtype)
        settings = {"index_selector": selector, "sparta_interval": sparta_interval, "seed": seed}
        super().__init__([recipe], inner, codec=codec, shared_dtype=shared_dtype, **settings)


class SPARTADiLoCoStrategy(Averaged):
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
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        check_integer("H", H, least=1)
        check_integer("sparta_interval", sparta_interval, least=1)
        optim = one_of(
            optim_spec=optim_spec, inner_optim=inner_optim, inner_optim_spec=inner_optim_spec
        )
        inner = inner_step_of(optim, max_norm, lr_scheduler, lr_scheduler_kwargs)
        outer = ensure_optim_spec(outer_optim_spec, OUTER)
        selector = _selector(p_sparta, index_selector)
        recipes = [
            SpartaRecipe(selector, sparta_interval, seed=seed, shared_dtype=shared_dtype),
            DiLoCoRecipe(
                outer,
                H,
                backup_device=None,
                error_feedback=error_feedback,
                shared_dtype=shared_dtype,
            ),
        ]
        settings = {"index_selector": selector, "sparta_interval": sparta_interval, "seed": seed}
        super().__init__(
            recipes,
            inner,
            codec=codec,
            error_feedback=error_feedback,
            H=H,
            outer_optimizer=outer,
            shared_dtype=shared_dtype,
            **settings,
        )


def _selector(p: float | None, selector: Selector | None) -> Selector:
    if selector is None:
        return RandomIndexSelector(0.005 if p is None else p)
    if p is not None:
        raise SettingsError("index_selector says which weights: leave p_sparta out")
    return selector
