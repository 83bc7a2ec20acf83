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

from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import torch

from torchft.arguments import check_integer, check_number
from torchft.errors import SettingsError
from torchft.renamed import renamed_arguments
from torchft.strategies.all_reduce import AllReduceRecipe
from torchft.strategies.buffers import LEFT
from torchft.strategies.demo import DeMoRecipe
from torchft.strategies.diloco import DiLoCoRecipe
from torchft.strategies.fedavg import FedAvgRecipe
from torchft.strategies.fragments import SEQUENTIAL
from torchft.strategies.inner import Inner
from torchft.strategies.local_sgd import LocalSGDRecipe
from torchft.strategies.named import Averaged, Named, Optim, inner_step_of
from torchft.strategies.optim_spec import OptimSpec, ensure_optim_spec
from torchft.strategies.parts.chunks import MODEL
from torchft.strategies.parts.largest import SENDERS
from torchft.strategies.parts.precision import SharedDtype
from torchft.strategies.parts.selectors import RandomIndexSelector, Selector
from torchft.strategies.recipe import Recipe
from torchft.strategies.sparta import SpartaRecipe
from torchft.strategies.top_k import TopKRecipe

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

_OUTER = OptimSpec(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
_PLAIN_OUTER = OptimSpec(torch.optim.SGD, lr=1.0)
_SIGN_STEP = OptimSpec(torch.optim.SGD, lr=1e-3)


class _WithOuter(Protocol):
    H: int
    outer_optim_spec: Optim


@dataclass(eq=False, repr=False)
class SimpleReduceStrategy(Averaged):
    """Average all gradients in every step."""

    optim_spec: Optim = None
    max_norm: float | None = None
    _: KW_ONLY
    error_feedback: bool = False

    def _recipes(self) -> list[Recipe]:
        return [AllReduceRecipe(error_feedback=self.error_feedback)]


@dataclass(eq=False, repr=False)
class FedAvgStrategy(Averaged):
    """Average the weights every H steps, among all or within random islands of `island_size`.

    Nodes weigh "equal", or by the "samples" that each has: `weighting`, see `fedavg.py`.
    """

    inner_optim: Optim = None
    island_size: int | None = None
    H: int = 1
    max_norm: float | None = None
    _: KW_ONLY
    seed: int = 0
    weighting: str | None = None
    shared_dtype: SharedDtype = torch.float32

    def _recipes(self) -> list[Recipe]:
        check_integer("H", self.H, least=1)
        recipe = FedAvgRecipe(
            self.H,
            island_size=self.island_size,
            seed=self.seed,
            weighting=self.weighting,
            shared_dtype=self.shared_dtype,
            backup_device=None,
        )
        return [recipe]


@dataclass(eq=False, repr=False)
class LocalSGDStrategy(Averaged):
    """Average the weights among all every H steps; a discarded round brings the last
    average back."""

    optim_spec: Optim = None
    H: int = 100
    max_norm: float | None = None
    _: KW_ONLY
    buffers: str = LEFT
    shared_dtype: SharedDtype = torch.float32

    def _recipes(self) -> list[Recipe]:
        check_integer("H", self.H, least=1)
        recipe = LocalSGDRecipe(
            self.H, buffers=self.buffers, shared_dtype=self.shared_dtype, backup_device=None
        )
        return [recipe]


@dataclass(eq=False, repr=False)
class DiLoCoStrategy(Averaged):
    """Every H steps, exactly, an outer optimizer steps with the mean of what the nodes moved."""

    optim_spec: Optim = None
    outer_optim_spec: Optim = None
    H: int = 100
    max_norm: float | None = None
    _: KW_ONLY
    buffers: str = LEFT
    error_feedback: bool = False
    shared_dtype: SharedDtype = torch.float32

    def _recipes(self) -> list[Recipe]:
        recipe = DiLoCoRecipe(
            _outer(self, _OUTER),
            self.H,
            buffers=self.buffers,
            error_feedback=self.error_feedback,
            shared_dtype=self.shared_dtype,
            backup_device=None,
        )
        return [recipe]


@renamed_arguments(fragment_sync_delay="delay", fragment_update_alpha="mix")
@dataclass(eq=False, repr=False)
class StreamingDiLoCoStrategy(Averaged):
    """DiLoCo by `fragments` in turn: the k-th round closes after step ⌊kH/fragments⌋, for any H.

    Their blocks are neighbours ("sequential"), or dealt out in turn ("strided").

    It opens `delay` steps before, and the average travels while they are taken; then
    w ← `mix` · w + (1 - `mix`) · backup.
    """

    optim_spec: Optim = None
    outer_optim_spec: Optim = None
    H: int = 100
    fragments: int = 4
    max_norm: float | None = None
    _: KW_ONLY
    pattern: str = SEQUENTIAL
    buffers: str = LEFT
    delay: int = 0
    mix: float = 0.0
    error_feedback: bool = False
    shared_dtype: SharedDtype = torch.float32

    def _recipes(self) -> list[Recipe]:
        recipe = DiLoCoRecipe(
            _outer(self, _OUTER),
            self.H,
            fragments=self.fragments,
            delay=self.delay,
            mix=self.mix,
            pattern=self.pattern,
            buffers=self.buffers,
            error_feedback=self.error_feedback,
            shared_dtype=self.shared_dtype,
            backup_device=None,
        )
        return [recipe]


@dataclass(eq=False, repr=False)
class SPARTAStrategy(Averaged):
    """Average a share `p_sparta` (0.005) of the weights, at random, every `sparta_interval` steps.

    `index_selector` chooses them in another way; it stands instead of `p_sparta`.
    """

    optim_spec: Optim = None
    p_sparta: float | None = None
    sparta_interval: int = 1
    max_norm: float | None = None
    _: KW_ONLY
    index_selector: Selector | None = None
    seed: int = 0
    shared_dtype: SharedDtype = torch.float32

    def _recipes(self) -> list[Recipe]:
        return [_sparta(self)]


@dataclass(eq=False, repr=False)
class SPARTADiLoCoStrategy(Averaged):
    """SPARTA between the rounds of DiLoCo. Where both are due, SPARTA goes first."""

    inner_optim_spec: Optim = None
    outer_optim_spec: Optim = None
    p_sparta: float | None = None
    sparta_interval: int = 1
    H: int = 100
    max_norm: float | None = None
    _: KW_ONLY
    index_selector: Selector | None = None
    seed: int = 0
    error_feedback: bool = False
    shared_dtype: SharedDtype = torch.float32

    def _recipes(self) -> list[Recipe]:
        diloco = DiLoCoRecipe(
            _outer(self, _OUTER),
            self.H,
            error_feedback=self.error_feedback,
            shared_dtype=self.shared_dtype,
            backup_device=None,
        )
        return [_sparta(self), diloco]


def _outer(said: _WithOuter, default: OptimSpec) -> OptimSpec:
    """The outer optimizer of a strategy, which stands among its settings then. H is checked by the
    name that it has here."""
    check_integer("H", said.H, least=1)
    said.outer_optim_spec = outer = ensure_optim_spec(said.outer_optim_spec, default)
    return outer


def _sparta(said: SPARTAStrategy | SPARTADiLoCoStrategy) -> SpartaRecipe:
    check_integer("sparta_interval", said.sparta_interval, least=1)
    if said.index_selector is None:
        said.index_selector = RandomIndexSelector(0.005 if said.p_sparta is None else said.p_sparta)
        said.p_sparta = None  # the selector has it
    if said.p_sparta is not None:
        raise SettingsError("index_selector says which weights: leave p_sparta out")
    return SpartaRecipe(
        said.index_selector, said.sparta_interval, seed=said.seed, shared_dtype=said.shared_dtype
    )


@dataclass(eq=False, repr=False)
class DeMoStrategy(Named):
    """Send the largest DCT coefficients of each node's momentum; step with the sign of their mean.

    The inner optimizer is SGD with lr 1e-3, unless plain SGD with another one is given; any other
    optimizer is refused, since it would take the signs for gradients. `weight_decay` is decoupled:
    w ← w - lr · weight_decay · w. `mean_over`: see `demo.py`.
    """

    compression_decay: float = 0.999
    compression_topk: int = 32
    compression_chunk: int = 64
    weight_decay: float = 0.0
    max_norm: float | None = None
    _: KW_ONLY
    mean_over: str = SENDERS

    def _recipes(self) -> list[Recipe]:
        recipe = DeMoRecipe(
            self.compression_decay,
            self.compression_topk,
            self.compression_chunk,
            max_norm=self.max_norm,
            mean_over=self.mean_over,
        )
        return [recipe]

    def _inner_step(self) -> Inner:
        """The recipe clips, before its momentum takes the gradient up."""
        optim = _with_decay(self._inner_optim(_SIGN_STEP), self.weight_decay)
        return inner_step_of(optim, None, self.lr_scheduler, self.lr_scheduler_kwargs)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "max_norm": self.max_norm}


def _with_decay(optim: OptimSpec, weight_decay: float) -> OptimSpec:
    check_number("weight_decay", weight_decay, least=0)
    if not weight_decay:
        return optim
    if "weight_decay" in optim.kwargs:
        raise SettingsError(f"{optim!r} has a weight_decay: leave the strategy's out")
    # Plain SGD adds the decay to the gradient and steps once: that is the decoupled one.
    return OptimSpec(optim.cls, **optim.kwargs, weight_decay=weight_decay)


@dataclass(eq=False, repr=False)
class TopKStrategy(Named):
    """DiLoCo that sends `topk` of every `chunk` numbers, and keeps the rest for later rounds.

    The outer optimizer is SGD with lr 1 unless another is given: the residual is its momentum.
    `mean_over` and `chunks_of`: see `top_k.py`.
    """

    optim_spec: Optim = None
    outer_optim_spec: Optim = None
    H: int = 100
    topk: int = 64
    chunk: int = 4096
    decay: float = 0.95
    max_norm: float | None = None
    _: KW_ONLY
    mean_over: str = SENDERS
    chunks_of: str = MODEL
    shared_dtype: SharedDtype = torch.float32

    def _recipes(self) -> list[Recipe]:
        recipe = TopKRecipe(
            _outer(self, _PLAIN_OUTER),
            self.H,
            topk=self.topk,
            chunk=self.chunk,
            decay=self.decay,
            mean_over=self.mean_over,
            chunks_of=self.chunks_of,
            shared_dtype=self.shared_dtype,
        )
        return [recipe]
