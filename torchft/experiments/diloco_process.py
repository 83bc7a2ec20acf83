"""One process of diloco-sim, for subclasses that override its methods.

    class Clipped(DilocoSimulator):
        def _train_step(self):
            x, y = self._get_batch()
            self.optimizer.zero_grad()
            loss = self.config.loss_fn(self.model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_value_(self.model.parameters(), 0.1)
            self.optimizer.step()
            return loss.item()

Nodes that are rows of one process call none of these methods. So `train` runs a subclass that has
its own ones over a real process for each node, in which they are called as in diloco-sim:

    _setup                    _setup_model, _setup_optimizer, _setup_scheduler; at rank 0
                              _setup_master_model, _setup_master_optimizer
    _train_loop               each step: _interpolate_models (SPARTA), _train_step (_get_batch);
                              where due _outer_step, _evaluate (_eval_model), _save_checkpoint
    _outer_step               _average_models; at rank 0 _set_master_grad, a step of the outer
                              optimizer, _synchronize_master_model; _broadcast_model_params

Other than in diloco-sim the outer optimizer's step reaches the models, and a round comes after
every `diloco_interval` steps exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchft.errors import SettingsError
from torchft.experiments.loggers import perplexity
from torchft.experiments.spmd.node import SPMDNode
from torchft.simulator.feed import Feed
from torchft.simulator.node import to_device
from torchft.simulator.program import SPMDProgram
from torchft.strategies import ScheduleSpec
from torchft.strategies.parts.precision import shared_dtype_of

if TYPE_CHECKING:
    from torchft.experiments.diloco_simulator import DilocoSimulatorConfig

__all__ = ["DilocoProcess", "DilocoProgram", "EvalStats", "TrainStats", "overridden"]

_NOT_CALLED = (
    "_correlation_calculation",
    "_initialize_distributed",
    "_load_checkpoint",
    "_setup_eval_dataloader",
    "_setup_train_dataloader",
)
"""Of diloco-sim, and of no use here: data and processes are made elsewhere."""


@dataclass(frozen=True)
class TrainStats:
    """Of one step: the mean over all nodes."""

    loss: float
    perplexity: float


@dataclass(frozen=True)
class EvalStats:
    """The figures that one evaluation of the model gave."""

    loss: float
    perplexity: float
    glob: bool
    """True: of the mean of all models. False: the mean of what the nodes' own models give."""


class DilocoProcess:
    """The methods that subclasses override, and what they find in `self`."""

    config: DilocoSimulatorConfig
    rank: int
    device: torch.device
    model: Any
    """In a process: the module that it trains."""
    optimizer: Optimizer
    scheduler: LRScheduler | None
    master_model: nn.Module
    """At rank 0."""
    master_optimizer: Optimizer
    """At rank 0."""
    local_step: int
    max_local_step: int
    _node: SPMDNode

    # --- at the start

    def _setup(self, rank: int) -> None:
        self.rank, self.local_step = rank, 0
        self._setup_model()
        self._setup_optimizer()
        self._setup_scheduler()
        if rank == 0:
            self._initialize_logging()
            self._setup_master_model()
            self._setup_master_optimizer()

    def _initialize_logging(self) -> None:
        """At rank 0: for loggers of a subclass."""

    def _setup_model(self) -> None:
        """All nodes start from the same one, which the run has made."""
        self.model = self._node.model.net

    def _setup_optimizer(self) -> None:
        config = self.config
        self.optimizer = config.optimizer_cls(self.model.parameters(), **config.optimizer_kwargs)

    def _setup_scheduler(self) -> None:
        config, self.scheduler = self.config, None
        if config.warmup_steps or config.cosine_anneal:
            shape = {"warmup_steps": config.warmup_steps, "cosine_anneal": config.cosine_anneal}
            spec = ScheduleSpec("lambda_cosine", **shape)
            self.scheduler = spec.build(self.optimizer, self.max_local_step)

    def _setup_master_model(self) -> None:
        """In fp32 at least, so that small outer steps add up beside bf16 models too."""
        self.master_model = copy.deepcopy(self.model).cpu()
        for master in self.master_model.parameters():
            if master.is_floating_point():
                master.data = master.data.to(shared_dtype_of(master.dtype, torch.float32))

    def _setup_master_optimizer(self) -> None:
        config = self.config
        parameters = self.master_model.parameters()
        self.master_optimizer = config.outer_optimizer_cls(
            parameters, **config.outer_optimizer_kwargs
        )

    # --- in each step

    def _train(self, rank: int) -> None:
        self._setup(rank)
        self._train_loop()

    def _train_loop(self) -> None:
        while self.local_step < self.max_local_step:
            self._evaluate_if_due()
            step, lr = self.local_step, float(self.optimizer.param_groups[0]["lr"])
            if self.config.p_sparta and step % self.config.sparta_interval == 0:
                self._interpolate_models()
            self._node.seed(step)
            loss = self._train_step()
            self.local_step += 1
            self._synchronise_if_due()
            self._tell(step, self._last_loss if loss is None else float(loss), lr)
        self._evaluate_if_due(at_the_end=True)

    def _tell(self, step: int, loss: float | None, lr: float) -> None:
        self._node.report(step, loss, lr)
        if self.rank == 0 and loss is not None:
            self._log_train(TrainStats(loss, perplexity(loss)))

    def _log_train(self, train_stats: TrainStats) -> None:
        """At rank 0, after each step: for loggers of a subclass."""

    def _synchronise_if_due(self) -> None:
        config, step = self.config, self.local_step
        if step % config.diloco_interval == 0:
            self._outer_step()
        saved = config.ckpt_interval and config.ckpt_interval * config.diloco_interval
        if self.rank == 0 and saved and step % saved == 0:
            self._save_checkpoint()

    def _get_batch(self, eval: bool = False) -> tuple[Any, Any]:  # noqa: A002
        """The next batch of this node. For evaluation, of the held-out samples; where there are
        none, of this node's from the first on, which training does not miss."""
        if eval:
            held_out, at = self._held_out, self._eval_batches
            batch = self._node.batch(at) if held_out is None else held_out.batch(0, at)
            self._eval_batches += 1
        else:
            batch = self._node.batch(self._train_batches)
            self._train_batches += 1
        x, y = to_device(batch, self.device)
        return x, y

    def _train_step(self) -> Tensor | float | None:
        """One step of this node; returns its loss."""
        x, y = self._get_batch()
        size = self.config.max_minibatch_size or len(x)
        total = 0.0
        self.optimizer.zero_grad()
        for at in range(0, len(x), size):
            part = slice(at, at + size)
            loss = self.config.loss_fn(self.model(x[part]), y[part]) * (len(x[part]) / len(x))
            loss.backward()
            total += loss.item()
        if self.config.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return total

    @torch.no_grad()
    def _interpolate_models(self) -> None:
        """SPARTA: average a share of the weights, which all nodes draw alike."""
        self._node.seed_alike(self.local_step)
        for parameter in self.model.parameters():
            mask = (
                torch.rand(parameter.shape, dtype=torch.float32, device=parameter.device)
                < self.config.p_sparta
            )
            chosen = parameter.data[mask]
            if chosen.numel():
                dist.all_reduce(chosen)
                parameter.data[mask] = chosen / self.config.num_nodes

    # --- the outer step

    def _outer_step(self) -> None:
        self._average_models()
        if self.rank == 0:
            self.master_optimizer.zero_grad()
            self._set_master_grad()
            self.master_optimizer.step()
            self._synchronize_master_model()
        self._broadcast_model_params()

    def _average_models(self) -> None:
        for parameter in self.model.parameters():
            mean = parameter.data.to(shared_dtype_of(parameter.dtype, torch.float32))
            dist.all_reduce(mean)
            parameter.data.copy_(mean / self.config.num_nodes)

    def _set_master_grad(self) -> None:
        """The master's gradient is what the nodes moved away from it, in the mean."""
        own = dict(self.model.named_parameters())
        for name, master in self.master_model.named_parameters():
            mean = own[name].data.to(master.device)
            # What the nodes moved from: the master as they hold it.
            held = master.data.to(mean.dtype).to(master.dtype)
            master.grad = held - mean.to(master.dtype)

    def _synchronize_master_model(self) -> None:
        """The model of rank 0 becomes the master."""
        own = dict(self.model.named_parameters())
        for name, master in self.master_model.named_parameters():
            own[name].data.copy_(master.data)

    def _broadcast_model_params(self) -> None:
        for parameter in self.model.parameters():
            dist.broadcast(parameter.data, src=0)

    # --- now and then

    def _evaluate_if_due(self, *, at_the_end: bool = False) -> None:
        interval = self.config.eval_interval or self.config.diloco_interval
        if self._evaluates and (at_the_end or self.local_step % interval == 0):
            self._evaluate()

    @torch.no_grad()
    def _evaluate(self) -> None:
        """`_eval_model` of this node's model, and of the mean of all."""
        local = self._eval_at_start()
        with self._node.holding_mean(self.model):
            together = self._eval_at_start()
        if local is not None and together is not None:
            self._node.report_validation(self.local_step, float(local), float(together))
            for loss, glob in ((float(local), False), (float(together), True)):
                if self.rank == 0:
                    self._log_eval(EvalStats(loss, perplexity(loss), glob))

    def _log_eval(self, eval_stats: EvalStats) -> None:
        """At rank 0, after each evaluation: for loggers of a subclass."""

    def _eval_at_start(self) -> Tensor | float | None:
        """All models see the same samples."""
        self._eval_batches = 0
        training = self.model.training
        found = self._eval_model()
        self.model.train(training)
        return found

    def _eval_model(self) -> Tensor | float | None:
        """The mean loss of `self.model` over `eval_iters` held-out batches."""
        self.model.eval()
        total = 0.0
        for _ in range(self.config.eval_iters):
            x, y = self._get_batch(eval=True)
            total += float(self.config.loss_fn(self.model(x), y))
        return total / self.config.eval_iters

    def _save_checkpoint(self) -> None:
        """At rank 0: the state dict of its model."""
        assert self.config.save_dir is not None
        folder = Path(self.config.save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / f"model_{self.local_step}.pt")

    def _cleanup(self) -> None:
        """At the end, however it comes: for loggers of a subclass."""

    # --- what runs all of it

    def _begin(self, node: SPMDNode) -> None:
        config = self.config
        self._node, self.device = node, node.device
        self.max_local_step = node.total_steps
        self._train_batches = self._eval_batches = 0
        self._held_out = None
        if config.eval_dataset is not None:
            self._held_out = Feed(
                config.eval_dataset, num_nodes=1, batch_size=config.batch_size, seed=config.seed
            )
        own = {"_eval_model", "_evaluate"} & set(overridden(self))
        self._evaluates = self._held_out is not None or bool(own)
        self.config = replace(config, loss_fn=self._noting(config.loss_fn))
        self._last_loss: float | None = None

    def _noting(self, loss_fn: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        """For a `_train_step` that returns nothing: the last loss is the one that it computed."""

        def noted(output: Any, y: Any) -> Tensor:
            loss = loss_fn(output, y)
            if torch.is_grad_enabled():
                self._last_loss = float(loss.detach())
            return loss

        return noted


_ORIGINAL = {name: of for name, of in vars(DilocoProcess).items() if callable(of)}


def overridden(simulator: DilocoProcess) -> list[str]:
    """Which of the methods a subclass, or somebody who assigned to a class or to this object, has
    made anew.

    Raises:
        SettingsError: one that nothing here would call.
    """
    cls = type(simulator)
    lost = [name for name in _NOT_CALLED if hasattr(simulator, name)]
    if lost:
        raise SettingsError(
            f"{cls.__name__} has {', '.join(lost)} of diloco-sim, which nothing calls here: use "
            "_get_batch, _setup_model, _train_step, _average_models, _outer_step or _eval_model"
        )
    own = vars(simulator)
    return [name for name, of in _ORIGINAL.items() if name in own or getattr(cls, name) is not of]


class DilocoProgram(SPMDProgram):
    """Runs a subclass of `DilocoSimulator` with a process for each node."""

    def __init__(self, simulator: DilocoProcess) -> None:
        self.simulator = simulator

    def spmd_main(self, node: SPMDNode) -> None:
        """Run the whole training of one node's process."""
        simulator = self.simulator
        simulator._begin(node)
        try:
            simulator._train(node.rank)
            node.model.net = simulator.model
        finally:
            simulator._cleanup()

    def spmd_settings(self) -> dict[str, Any]:
        """The class whose overridden methods the program calls, as plain data."""
        name = type(self.simulator).__name__
        return {"strategy": name, "overrides": overridden(self.simulator)}
