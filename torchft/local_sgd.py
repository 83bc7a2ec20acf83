"""LocalSGD and DiLoCo: a context around an ordinary training loop.

    with DiLoCo(manager, [model], inner, outer, sync_every=500):
        for batch in batches:
            loss(model(batch)).backward()
            inner.step()                  # every 500th also synchronises with the other groups
            inner.zero_grad()

What is averaged, when and how it is applied is a recipe in `torchft.strategies`; the context is
`torchft.strategy_hooks`. Entering it meets the other groups, so that all start from equal weights.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchft import settings
from torchft.arguments import check_integer
from torchft.errors import SettingsError
from torchft.quantization import Codec
from torchft.replicated_arguments import check_inner
from torchft.sharded import local_part
from torchft.step_hooks import check_optimizer
from torchft.strategies import diloco, local_sgd
from torchft.strategies.buffers import LEFT
from torchft.strategies.fragments import SEQUENTIAL
from torchft.strategies.local import Fragment
from torchft.strategies.parts.outer import ModelOuter
from torchft.strategies.parts.precision import SharedDtype
from torchft.strategies.parts.weighting import EQUAL, SAMPLES
from torchft.strategy_hooks import StrategyHooks

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["DiLoCo", "LocalSGD", "extract_local_tensor"]

_MIB = 2**20
_NO_BUCKETS = (
    "bucket_cap_mb={} does nothing without use_bucketization=True: each round's numbers travel in "
    "one collective"
)


def extract_local_tensor(t: Tensor) -> Tensor:
    """A copy of `t` without its graph; of a DTensor, the part that lies here."""
    return local_part(t).clone()


class LocalSGD(StrategyHooks):
    """Average the weights of `model` with the other groups every `sync_every` steps of `optimizer`.

    A round that is discarded brings back the last average, from a backup on `backup_device` (the
    CPU by default; 4 bytes per fp32 parameter). With `backup=False` the local weights stand. With
    `deterministic=True` averages are summed in the order of the groups' names, as the simulator
    does, so that a run can be repeated bit by bit. `should_quantize`, `buffers` and `shared_dtype`
    are those of `DiLoCo`; here it is the average that is kept, and travels, in it.

    Raises:
        SettingsError: `sync_every` below 1, nothing to train, no such codec, or no optimizer.
        PhaseError: at the first step that is taken without entering the context.
        MismatchError: at a step, when other parameters are trained than at the beginning.
    """

    def __init__(
        self,
        manager: Manager,
        model: nn.Module,
        optimizer: Optimizer,
        sync_every: int,
        *,
        backup: bool = True,
        backup_device: torch.device | None = None,
        pin_memory: bool = True,
        should_quantize: bool | str | Codec = False,
        deterministic: bool = False,
        buffers: str = LEFT,
        shared_dtype: SharedDtype = torch.float32,
        samples: int | None = None,
    ) -> None:
        check_inner(optimizer)
        if samples is not None:
            check_integer("samples", samples)
        recipe = local_sgd.LocalSGDRecipe(
            sync_every,
            backup=backup,
            weighting=EQUAL if samples is None else SAMPLES,
            buffers=buffers,
            shared_dtype=shared_dtype,
            backup_device=backup_device or "cpu",
            pin_memory=pin_memory,
        )
        self._recipe = recipe
        super().__init__(
            manager,
            [model],
            recipe,
            optimizer,
            should_quantize=should_quantize,
            deterministic=deterministic,
            samples=samples,
        )

    def _register(self) -> None:
        self._manager.register_state_dict_fn("LocalSGD", self._heal, self._recipe.state_dict)

    def _heal(self, state: dict[str, Any]) -> None:
        """The weights come along at once: a group may also heal after its last round."""
        self._loaded = True
        self._recipe.load_state_dict(state)
        if self._recipe.backup is not None:
            self._recipe.backup.restore()

    def sync(self) -> None:
        """Average now, and count the steps to the next average from here."""
        clock = self._strategy.clock
        clock.steps += -clock.steps % self._recipe.sync_every
        self._strategy.synchronise()
        self._hooks.watch.forget()

    @property
    def _local_step(self) -> int:
        """Inner steps since the last average."""
        return self._strategy.clock.steps % self._recipe.sync_every


class DiLoCo(StrategyHooks):
    """Step `outer_optimizer` with the mean of what the groups moved in `sync_every` inner steps.

    With n fragments, one of them synchronises every `sync_every / n` inner steps. A parameter that
    several fragments share belongs to the first; frozen parameters are not sent.

    Args:
        manager: with `use_async_quorum=True` and a delay, rounds form in the background: training
            goes on while a group is late, joins or heals, until the average is due.
        model_fragments: modules that together hold what is trained, each a fragment; `[model]` for
            plain DiLoCo, or to have it cut into `fragments`.
        inner_optimizer: what the training loop steps.
        outer_optimizer: over the same parameters; one for all, or one per fragment.
        sync_every: inner steps between two synchronisations of the same fragment.
        backup_device: where the last synchronised weights are kept; None is the CPU.
        pin_memory: pin that backup when the parameters are on a GPU.
        use_bucketization: send at most `bucket_cap_mb` MiB (1024 by default) in one collective.
            Without it `bucket_cap_mb` does nothing, and a warning says so.
        should_quantize: send less. True means int8, or fp8 on CUDA devices from capability 9.0 on;
            "bf16", "fp8", "int8", "int4" or a codec, that one. All groups must mean the same.
        fragment_sync_delay: inner steps that are taken while the average travels.
        fragment_update_alpha: the share of the local weights that is kept: 0 none, 1 all.
        deterministic: sum in the order of the groups' names, as the simulator does, so that a run
            can be repeated bit by bit.
        inner_state: after a discarded round the inner optimizer's state "stands", or is "restored"
            with the weights: moments and counters, not the learning rate. That costs a copy of
            them on `backup_device` (8 bytes a parameter for AdamW). What is NaN or infinite in it
            never stands: that parameter's state begins anew.
        fragments: cut the one module into so many, in whole blocks of about equal bytes
            (`torchft.strategies.fragments`). Not with several modules, which are the fragments.
        fragment_pattern: a fragment's blocks are neighbours ("sequential"), or "strided".
        buffers: in each round that commits, the groups' buffers are "left" alone, "averaged", or
            "copied" from the first group (`torchft.strategies.buffers`).
        error_feedback: with `should_quantize`, add what it loses of a delta to the next one of that
            fragment. That costs 4 bytes a parameter beside the parameters, and as many again for
            each round that is open.
        shared_dtype: at least this is what the last synchronised weights, the outer optimizer's
            state, and without `should_quantize` the deltas that travel, are kept in, also where
            parameters are bf16 or fp16 (`torchft.strategies.parts.precision`): then
            `outer_optimizer` is given fp32 parameters in the place of the model's, which lie on
            `backup_device` and are stepped there. None: each parameter's own dtype.

    Raises:
        SettingsError: also a ValueError; an argument that does not fit, and what would.
        PhaseError: at the first step that is taken without entering the context.
        MismatchError: at a step, when other parameters are trained than at the beginning, or a
            parameter has been frozen for a whole round.
        AssertionError: a list of outer optimizers of another length than the fragments.
    """

    def __init__(
        self,
        manager: Manager,
        model_fragments: list[nn.Module],
        inner_optimizer: Optimizer,
        outer_optimizer: Optimizer | list[Optimizer],
        sync_every: int,
        backup_device: torch.device | None = None,
        pin_memory: bool = True,
        use_bucketization: bool = False,
        bucket_cap_mb: int | None = None,
        should_quantize: bool | str | Codec = False,
        fragment_sync_delay: int = 0,
        fragment_update_alpha: float = 0.0,
        *,
        deterministic: bool = False,
        inner_state: str = "stands",
        fragments: int | None = None,
        fragment_pattern: str = SEQUENTIAL,
        buffers: str = LEFT,
        error_feedback: bool = False,
        shared_dtype: SharedDtype = torch.float32,
    ) -> None:
        _refuse(model_fragments, bucket_cap_mb)
        parts = _parts(model_fragments, fragments, fragment_pattern)
        check_inner(inner_optimizer)
        outers = outer_optimizer if isinstance(outer_optimizer, list) else [outer_optimizer]
        for outer in outers:
            check_optimizer("outer_optimizer", outer)
        if isinstance(outer_optimizer, list):
            assert len(outers) == parts, f"{len(outers)} outer optimizers for {parts} fragments"
        diloco.check_schedule(
            sync_every,
            parts,
            fragment_sync_delay,
            fragment_update_alpha,
            called=("fragment_sync_delay", "fragment_update_alpha"),
        )
        self._recipe = diloco.DiLoCoRecipe(
            ModelOuter(outers, keep_weights=fragment_update_alpha > 0),
            sync_every,
            fragments=parts,
            pattern=fragment_pattern,
            delay=fragment_sync_delay,
            mix=fragment_update_alpha,
            inner_state=inner_state,
            buffers=buffers,
            error_feedback=error_feedback,
            shared_dtype=shared_dtype,
            backup_device=backup_device or "cpu",
            pin_memory=pin_memory,
        )
        use_bucketization = use_bucketization or settings.text(settings.USE_BUCKETIZATION) == "True"
        if bucket_cap_mb is not None and not use_bucketization:
            warnings.warn(_NO_BUCKETS.format(bucket_cap_mb), stacklevel=2)
        bucket_bytes = (bucket_cap_mb or 1024) * _MIB if use_bucketization else None
        super().__init__(
            manager,
            model_fragments,
            self._recipe,
            inner_optimizer,
            should_quantize=should_quantize,
            bucket_bytes=bucket_bytes,
            deterministic=deterministic,
        )

    def _register(self) -> None:
        for fragment in self._recipe.fragments:
            key = f"StreamingDiLoCoFragment_{fragment.index}"
            tensors = map(local_part, self._local.of(fragment))
            names = self._local.names_of(fragment)
            self._manager.fingerprint.describe_model(key, list(zip(names, tensors, strict=True)))
            self._manager.register_state_dict_fn(
                key,
                partial(self._heal_fragment, fragment),
                partial(self._recipe.fragment_state, fragment),
            )
        if self._recipe.delay:
            self._manager.state.offer_copies()
            key, take_over = "StreamingDiLoCo_open_rounds", self._strategy.take_over
            self._manager.register_state_dict_fn(key, take_over, self._strategy.open_rounds)
            self._manager.state.register_on_disk(key, take_over, list)

    def _heal_fragment(self, fragment: Fragment, state: dict[str, Any]) -> None:
        """The weights come along at once: a group may also heal after its last round."""
        self._loaded = True
        self._recipe.load_fragment_state(fragment, state)
        self._recipe.backups[fragment.index].restore()

    def shared_state_dict(self) -> dict[str, Any]:
        """The weights of the last synchronisation and the outer optimizers, by fragment: equal in
        all groups. Shares storage."""
        return self._recipe.state_dict()

    def _take_backup(self) -> None:
        super()._take_backup()
        # A step of the manager is a round here, also after a checkpoint was loaded.
        self._recipe.go_on_after(self._manager.current_step())


def _refuse(fragments: object, bucket_cap_mb: int | None) -> None:
    if isinstance(fragments, nn.Module):
        raise SettingsError("model_fragments is a list of modules: for one fragment pass [model]")
    if bucket_cap_mb is not None:
        check_integer("bucket_cap_mb", bucket_cap_mb, least=1)


def _parts(modules: list[nn.Module], fragments: int | None, pattern: str) -> int:
    """How many fragments there will be."""
    if len(modules) > 1 and (fragments is not None or pattern != SEQUENTIAL):
        raise SettingsError(
            f"{len(modules)} modules are the fragments already: leave fragments and "
            "fragment_pattern out, or pass [model] to have it cut"
        )
    return len(modules) if fragments is None else fragments
