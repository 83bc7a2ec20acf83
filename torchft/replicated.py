"""Any strategy of `torchft.strategies`, among real replica groups.

    replicated = Replicated(manager, model, optimizer, strategy)
    while replicated.step_count < 1000:
        replicated.zero_grad()               # who is there? heals this group first, if it is behind
        loss(model(batch)).backward()
        replicated.step()                    # the inner step, and a round where one is due
    replicated.finish()

The strategy is the object that the simulator runs: all-reduce, FedAvg, LocalSGD, DiLoCo, Streaming
DiLoCo, SPARTA, DeMo, top-k, several of them, or a recipe of your own. What a group needs that joins
or comes back travels by itself: weights, buffers, inner and outer optimizer, schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from torchft.arguments import check_integer
from torchft.errors import PhaseError, SettingsError
from torchft.ledger import Bucket
from torchft.manager.optimizer_state import optimizer_state
from torchft.manager.peers import ManagerPeers
from torchft.peers import Place
from torchft.quantization.proof import prove
from torchft.replicated_arguments import (
    check_inner,
    check_manager,
    modules_of,
    strategy_of,
    warn_of_strangers,
)
from torchft.step_guard import StepGuard
from torchft.step_hooks import check_no_closure, check_trains
from torchft.strategies.buffers import LEFT
from torchft.strategies.describe import differences_in_words, options_of
from torchft.strategies.inner import InnerOptimizer
from torchft.strategies.model_local import ModelLocal
from torchft.strategies.optim_spec import OptimSpec
from torchft.strategies.parts.precision import shared_dtype_of
from torchft.strategies.recipe import kind_of
from torchft.strategies.strategy import Strategy
from torchft.strategies.trained import TrainedModel
from torchft.uncopied import Uncopied

if TYPE_CHECKING:
    from torchft.manager import Manager
    from torchft.peers import Peers

__all__ = ["Replicated"]

State = dict[str, Any]

_PARTS = {"models", "optimizer", "strategy", "manager"}
"""What `state_dict` has had since the first version."""


class Replicated(Uncopied):
    """Trains `model` by `strategy` together with the other replica groups of `manager`.

    Args:
        manager: of this group. It needs no `state_dict` of its own: pass None twice, or what else
            should heal, such as a position in the data.
        model: the module as it is, not in torchft's `DistributedDataParallel`; or several modules,
            each a fragment of the strategy.
        optimizer: the inner optimizer, over the model's parameters; None: made as the strategy
            says (`inner=`), with the bits that the simulator has.
        strategy: not in use yet. All groups give the same.
        deterministic: sum in the order of the groups' names, as the simulator does, so that a run
            can be repeated bit by bit.
        samples: how many samples of its own this group trains on, for means that are weighed.
        own_data: whether these samples are the group's alone; by default, if `samples` is given.
        max_steps: inner steps of the whole run, for a learning-rate schedule that depends on it.
        peers: whom rounds are with, in the place of the manager's groups.

    Raises:
        SettingsError: the strategy is in use, is a bare recipe, or cannot run among groups; the
            optimizer is of another model, or not the one that the strategy names; the manager
            serves a Replicated already; nothing to train.
        ClosureError: the optimizer computes the loss in its step, as LBFGS does.
    """

    kind = "strategy"
    copy_instead = "save its state_dict(), and make another one with a manager of its own"
    gives_closures = False
    """Whether what steps the inner optimizer may give it a closure."""

    def __init__(
        self,
        manager: Manager,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | None,
        strategy: Strategy | None = None,
        *,
        deterministic: bool = False,
        samples: int | None = None,
        own_data: bool | None = None,
        max_steps: int | None = None,
        peers: Peers | None = None,
    ) -> None:
        strategy = strategy_of(strategy, optimizer)
        check_manager(manager)
        for name, value in {"samples": samples, "max_steps": max_steps}.items():
            if value is not None:
                check_integer(name, value, least=1)
        self._modules = modules_of(model)
        self._manager, self._strategy = manager, strategy
        self.optimizer: Any = self._inner(optimizer, max_steps)
        self._local = ModelLocal(self._modules, self.optimizer)
        self._local.samples = None if samples is None else [samples]
        self._local.own_data = samples is not None if own_data is None else own_data
        self._check_codecs()
        stepped = self.optimizer
        if isinstance(stepped, InnerOptimizer):
            stepped = stepped.optimizer
        self._stepped = stepped
        self._options = {"optimizer": type(stepped).__name__, **options_of(strategy)}
        check_trains(self._local.names, self._local.parameters, stepped)
        warn_of_strangers(self._local, stepped)
        self._trained = TrainedModel(self._modules, stepped, front=type(self).__name__)
        moved = [recipe.sync_every for recipe in strategy.recipes if recipe.moves_frozen]
        self._frozen_steps = min(moved, default=None)
        self._joined = self._loaded = self._begun = False
        if peers is None:
            delayed = len(strategy.recipes) == 1 and strategy.recipes[0].delay > 0
            background = delayed and not manager.options.sync
            peers = ManagerPeers(manager, deterministic=deterministic, background=background)
        strategy.bind(self._local, peers, applying=self._applying)
        self._describe(deterministic)
        self._register()
        manager.starting_state.add(self)
        instead = "call zero_grad() and step() of Replicated in place of the optimizer's"
        self._guard = StepGuard(
            stepped,
            f"{instead}, and with a GradScaler, where each step averages gradients, "
            "scaler.unscale_(optimizer) before that and scaler.update() after it",
        )

    # ------------------------------------------------------------------ a run

    @property
    def step_count(self) -> int:
        """Inner steps that were due so far, taken or skipped; equal in all groups at each round."""
        return self._strategy.clock.steps

    @property
    def strategy(self) -> Strategy:
        """The strategy that it was given, which is bound to these groups now."""
        return self._strategy

    def join(self) -> None:
        """Meet the other groups, so that all start from equal weights, or heal from them.

        `zero_grad` does it, the first time. Call it before to know `step_count` of the others.

        Raises:
            PhaseError: the others have another strategy or schedule.
            SettingsError: others that communicate both before and after the step train already.
        """
        if self._joined:
            return
        self._joined = True
        if self._loaded:
            self._strategy.settle_in()  # whatever else was loaded after it
        else:
            self._take_backup()
        # 0 participants: this process has not met the others in a quorum yet.
        if self._manager.options.init_sync and self._manager.num_participants() == 0:
            self._strategy.join()

    def zero_grad(self) -> None:
        """Begin a step: before the forward pass, which then runs on healed weights.

        Raises:
            TimeoutError, QuorumError: as `Manager.start_quorum` does.
        """
        self.join()
        self._guard.begin()
        self._strategy.begin()
        self._local.zero_grads()
        self._begun = True

    def step(self) -> bool:
        """Take the inner step, and communicate where the strategy says so.

        Returns:
            Whether the inner step was taken. It is skipped where gradients are averaged and that
            average was discarded.

        Raises:
            PhaseError: `zero_grad` was not called since the last step.
            MismatchError: other parameters are trained than at the beginning.
        """
        if not self._begun:
            raise PhaseError(
                "no step has begun: call zero_grad() before each forward pass, which meets the "
                "other groups and heals this one"
            )
        self._begun = False
        self._trained.check(self._frozen_steps)
        with self._guard.allowed():
            return self._strategy.step()

    def finish(self) -> bool:
        """End a run: close the rounds that are open, and let whoever missed the last one heal.

        Returns:
            Whether the others came; see `Manager.final_sync`.
        """
        self._strategy.finish()
        self._guard.end()
        return self._manager.final_sync()

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> State:
        """All of it, for a checkpoint: weights, buffers, inner and outer optimizer, schedules, the
        strategy's own state, and the manager's step. Shares storage.

        Raises:
            PhaseError: with a delay, while a round is in flight; `finish` closes it.
        """
        return {
            **self._weights_and_optimizer(),
            "strategy": self._strategy.state_dict(),
            "manager": self._manager.state_dict(),
            "options": self._options,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a checkpoint, before the first step.

        Raises:
            PhaseError: training has begun.
            SettingsError: the checkpoint was written with other options, or is none of
                `state_dict`.
        """
        self._refuse_late_load()
        self._check_options(state)
        self._load_weights_and_optimizer(state)
        self._strategy.load_state_dict(state["strategy"])
        self._manager.load_state_dict(state["manager"])
        self._loaded = True

    def shared_state_dict(self) -> State:
        """What is equal in all groups after each round: last synchronised weights, outer
        optimizers, the clock. Shares storage."""
        return self._strategy.shared_state_dict()

    def equal_state(self) -> State:
        """What is compared with groups that start at the same step. Local weights are equal only
        where gradients are averaged in every step."""
        recipes = self._strategy.recipes
        state: State = {f"recipe {at}": one.equal_state() for at, one in enumerate(recipes)}
        if any(one.place is Place.BEFORE and one.sync_every == 1 for one in recipes):
            named = {
                f"model {at}.{name}": parameter
                for at, module in enumerate(self._modules)
                for name, parameter in module.named_parameters()
            }
            names = {id(parameter): name for name, parameter in named.items()}
            state |= named | dict(optimizer_state(self._stepped, names))
        return state

    def _refuse_late_load(self, until: str = "the first step") -> None:
        if self._joined:
            raise PhaseError(f"training has begun: load a checkpoint before {until}")

    def _check_options(self, state: Any) -> None:
        if not isinstance(state, dict) or not state.keys() >= _PARTS:
            raise SettingsError(
                f"this is no state of Replicated, which has {', '.join(sorted(_PARTS))}: give what "
                "its state_dict() returned, and load weights alone into the model before"
            )
        # What only one of them knows is of another version.
        saved = {k: v for k, v in state.get("options", {}).items() if k in self._options}
        if found := differences_in_words(saved, {name: self._options[name] for name in saved}):
            raise SettingsError(
                f"the checkpoint was written with other options (checkpoint → here): {found}. Make "
                'them equal, or load its state["models"] alone to start afresh from these weights'
            )

    def _weights_and_optimizer(self) -> State:
        models = [module.state_dict() for module in self._modules]
        return {"models": models, "optimizer": self.optimizer.state_dict()}

    def _load_weights_and_optimizer(self, state: State) -> None:
        for module, saved in zip(self._modules, state["models"], strict=True):
            module.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])

    # ------------------------------------------------------------------ what a joining group gets

    def _register(self) -> None:
        self._manager.state.offer_copies()  # buffers change while a round is open
        self._manager.register_state_dict_fn("Replicated", self._heal, self._healing_state)
        self._manager.state.register_on_disk("Replicated", self._load_from_disk, self._shared)

    def _healing_state(self) -> State:
        return {**self._shared(), "open_rounds": self._strategy.open_rounds()}

    def _shared(self) -> State:
        strategy = {"strategy": self._strategy.shared_state_dict(), "options": self._options}
        return {**self._weights_and_optimizer(), **strategy}

    def _load_from_disk(self, state: State) -> None:
        """Rounds that were in flight have come to nothing, as discarded ones do."""
        self._check_options({**state, "manager": None})
        self._heal({**state, "open_rounds": []})
        self._loaded = True

    def _heal(self, state: State) -> None:
        self._load_weights_and_optimizer(state)
        self._strategy.load_shared_state_dict(state["strategy"])
        self._strategy.take_over(state["open_rounds"])

    # ------------------------------------------------------------------ parts

    def _inner(self, optimizer: Any, max_steps: int | None) -> Any:
        """What takes the inner step: the optimizer that was given, or one that the strategy names.

        Raises:
            SettingsError: neither names one, or they name different ones.
        """
        spec = self._strategy.inner
        if optimizer is not None:
            if not isinstance(optimizer, InnerOptimizer):
                check_inner(optimizer)
                if not self.gives_closures:
                    check_no_closure(type(optimizer))
                self._check_given(optimizer)
            return optimizer
        if spec is None:
            raise SettingsError(
                "neither an optimizer was given, nor does the strategy name one: give an "
                "optimizer, or Strategy(…, inner=Inner(OptimSpec(torch.optim.AdamW, lr=1e-3)))"
            )
        if spec.schedule is not None and spec.schedule.needs_max_steps and max_steps is None:
            raise SettingsError(
                f"the learning rate follows {spec.schedule!r}, which depends on how long the run "
                "is: give Replicated(…, max_steps=…)"
            )
        trained = [p for m in self._modules for p in m.parameters() if p.requires_grad]
        return spec.build([list(dict.fromkeys(trained))], max_steps or 1)

    def _check_given(self, optimizer: Any) -> None:
        if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, "defaults"):
            return  # a wrapper, which does not say what it wraps
        if self._strategy.inner is not None:
            self._strategy.inner.check_given(optimizer)
        else:
            for recipe in self._strategy.recipes:
                recipe.check_inner(OptimSpec.of(optimizer))

    def _check_codecs(self) -> None:
        for recipe in self._strategy.recipes:
            if recipe.codec is not None:
                for dtype, device in self._local.layout(self._local.whole).kinds:
                    prove(recipe.codec, shared_dtype_of(dtype, recipe.shared_dtype), device)

    def _describe(self, deterministic: bool) -> None:
        """Groups with another model or strategy are refused before any number is mixed."""
        named = zip(self._local.names, self._local.parameters, strict=True)
        self._manager.fingerprint.describe_model("model", list(named))
        recipes = self._strategy.recipes
        if any(recipe.buffers != LEFT for recipe in recipes):
            self._manager.fingerprint.describe_model(
                "model buffers", list(self._local.buffers()[0].items())
            )
        for name, value in {
            "strategy": ", ".join(kind_of(recipe) for recipe in recipes),
            "sync_every": ", ".join(str(recipe.sync_every) for recipe in recipes),
            "fragment_sync_delay": ", ".join(str(recipe.delay) for recipe in recipes),
            "deterministic": str(deterministic),
            "bucket bytes": str(self._strategy.bucket_bytes),
        }.items():
            self._manager.fingerprint.describe_setting(name, value)

    def _take_backup(self) -> None:
        """Training begins with the weights as they are now."""
        for recipe in self._strategy.recipes:
            recipe.take_backup()

    @contextmanager
    def _applying(self) -> Iterator[None]:
        """While parameters and state are half written, no donor reads them."""
        with self._manager.ledger.spending(Bucket.OPTIMIZER):
            self._manager.disallow_state_dict_read()
            try:
                yield
            finally:
                self._manager.allow_state_dict_read()
