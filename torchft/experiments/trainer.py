"""Train a model over N simulated nodes, in the manner of EXO Gym.

    trainer = Trainer(model, train_dataset, val_dataset)
    model = trainer.fit(num_epochs=1, strategy=DiLoCoStrategy(H=20), num_nodes=4)
    trainer.result.bytes_sent, trainer.result.validations, trainer.result.models

The model takes a batch and returns its loss. `fit` returns a copy of it that holds the mean of all
nodes; everything else that a run leaves is in `trainer.result`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from torchft.arguments import check_integer
from torchft.errors import SettingsError
from torchft.experiments.callbacks import Callbacks
from torchft.experiments.checkpoint import Saved
from torchft.experiments.devices import chosen_device
from torchft.experiments.folders import check_folder
from torchft.experiments.identity import config_of, identity_of
from torchft.experiments.loggers import Axis, LoggerChoice, check_loggers, chosen, writes_files
from torchft.experiments.minibatch import fitting_size
from torchft.experiments.run_folders import RunFolders, check_name, find_resumed
from torchft.experiments.validation import Validator
from torchft.launch.guard import check_guarded
from torchft.simulator.events import Event
from torchft.simulator.experiment import Experiment
from torchft.simulator.faults import FaultSchedule
from torchft.simulator.loop import run_stacked
from torchft.simulator.network import NetworkModel
from torchft.simulator.node import TrainNode
from torchft.simulator.program import (
    SPMDProgram,
    SPMDStrategy,
    as_strategy,
    needs_processes,
)
from torchft.simulator.result import Result
from torchft.strategies import Strategy

__all__ = ["Trainer"]


class Trainer:
    """A model and its data; `fit` trains it.

    Args:
        model: a module, or a factory of one. It is copied, never changed.
        train_dataset: a `Dataset`, tensors, or a factory `(rank, num_nodes, train_dataset: bool)`
            that gives each node its own.
        val_dataset: likewise; None: no validation.
        start_port: for scripts that give one. Nothing here listens on a fixed port.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; by default, and for "", the best that is there.
        devices: numbers of CUDA devices. Several need `fit(processes=True)`.
        node_cls: your subclass of `TrainNode`.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        train_dataset: Any,
        val_dataset: Any = None,
        start_port: int | None = None,
        device: torch.device | str | None = None,
        devices: Sequence[int] | None = None,
        *,
        node_cls: type[TrainNode] = TrainNode,
    ) -> None:
        if start_port is not None:
            warnings.warn(
                f"start_port={start_port} is not needed: simulated nodes have no ports, and real "
                "processes take free ones",
                stacklevel=2,
            )
        self.model, self.node_cls = model, node_cls
        self.train_dataset, self.val_dataset = train_dataset, val_dataset
        self.device, self.devices = device, devices
        self.result: Result | None = None
        """Of the last `fit`. Of one that broke off: what it had got by then, without a mean."""
        self._minibatch_sizes: dict[tuple[Any, ...], int] = {}

    def fit(
        self,
        num_epochs: int | None = None,
        strategy: Strategy | SPMDProgram | None = None,
        num_nodes: int | None = None,
        max_steps: int | None = None,
        batch_size: int = 16,
        minibatch_size: int | None = None,
        shuffle: bool = True,
        val_size: int = 64,
        val_interval: int = 100,
        autocast: bool | torch.dtype = False,
        checkpoint_interval: int | None = None,
        correlation_interval: int | None = None,
        save_dir: str | Path = "./checkpoints",
        dataloader_kwargs: Mapping[str, Any] | None = None,
        *,
        wandb_project: str | None = None,
        run_name: str | None = None,
        log_x_axis: Axis = "step",
        seed: int = 42,
        disable_logging: bool = False,
        force_minibatch_recalculate: bool = False,
        device: torch.device | str | None = None,
        logger: LoggerChoice = None,
        log_dir: str | Path = "logs",
        keep_checkpoints: int = 3,
        resume: bool | str | Path = False,
        processes: bool = False,
        deterministic: bool = False,
        digests: bool = False,
        network: NetworkModel | None = None,
        faults: FaultSchedule | None = None,
        weather: Any = None,
        events: Sequence[Event] = (),
    ) -> nn.Module:
        """Train, and return the mean of all nodes' models.

        Args:
            num_epochs: passes of all nodes together through the data; 1 where nothing says how
                long to train.
            strategy: what the nodes exchange, and how each steps; a new one for each run.
            max_steps: steps of each node. With both, whichever ends first.
            batch_size: of each node.
            minibatch_size: samples that go through the model at once; gradients add up to those
                of the whole batch. None: the batch, or what memory allows.
            val_size: samples of a validation; 0: none.
            val_interval: steps between two; there is one before the first step and at the end too.
                Real processes are looked at only then, but for those whose strategy calls
                collectives itself.
            autocast: True for bfloat16, or a dtype.
            checkpoint_interval: steps between two checkpoints, in `save_dir/run_name`; the end has
                one too. One that is due while a round is in flight is taken when none is.
            correlation_interval: steps between two comparisons of the nodes' weights.
            dataloader_kwargs: `num_workers`, `collate_fn` and the like, for torch's DataLoader.
            wandb_project: log to Weights & Biases.
            run_name: by default made of the strategy and the time. One whose logs are there is
                refused.
            log_x_axis: `step` or `examples`, for W&B and TensorBoard.
            seed: all that is random in the run follows from it.
            disable_logging: write no log and show no progress.
            device: wins over the Trainer's.
            logger: `csv` (default), `tensorboard`, `none`, a logger of your own, or a list.
            log_dir: CSV and TensorBoard files are in `log_dir/run_name`.
            keep_checkpoints: the newest that stay.
            resume: go on from the newest checkpoint of `run_name`, or from a file or folder.
            processes: real processes on this machine instead of rows of this one.
            deterministic: real processes compute the same bits as the simulation, which then has
                one thread as each of them has.
            digests: keep each node's digest after every synchronisation.
            network: speeds and links of the nodes, for `result.simulated`.
            faults: failures and joins by step, by simulated time or at random.
            weather: deprecated; network and faults in one.
            events: failures and joins at steps.

        Raises:
            SettingsError: it cannot run; before the first step wherever that can be known.
            NodeError: a loss is not finite; names node and step.
        """
        check_guarded()
        _check_interval("val_size", val_size, least=0)
        _check_interval("minibatch_size", minibatch_size)
        _check_interval("val_interval", val_interval)
        _check_interval("checkpoint_interval", checkpoint_interval)
        _check_interval("correlation_interval", correlation_interval)
        _check_interval("keep_checkpoints", _needed("keep_checkpoints", keep_checkpoints))
        check_loggers(logger, log_x_axis)
        check_name(run_name)
        strategy = as_strategy(_needed("strategy", strategy))
        if isinstance(strategy, SPMDStrategy) and not processes:
            raise SettingsError(needs_processes(strategy.program))
        experiment = self._experiment(
            strategy=strategy,
            num_nodes=_needed("num_nodes", num_nodes),
            num_epochs=1 if num_epochs is None and max_steps is None else num_epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            micro_batch_size=minibatch_size,
            shuffle=shuffle,
            autocast=autocast,
            dataloader_kwargs=dataloader_kwargs,
            seed=seed,
            device=device,
            several=processes,
            deterministic=deterministic,
            digests=digests,
            network=network,
            faults=faults,
            weather=weather,
            events=events,
        )
        experiment.check()
        if correlation_interval is not None and num_nodes == 1:
            warnings.warn("correlation_interval: one node has none to correlate with", stacklevel=2)
        if processes:
            _check_processes(experiment, checkpoint_interval, correlation_interval, resume)
        saved = find_resumed(resume, save_dir, run_name)
        self._set_minibatch_size(experiment, saved, force=force_minibatch_recalculate)
        identity = identity_of(experiment)
        if saved is not None:
            saved.check(identity)
            _check_steps_left(saved, experiment)
        folders: dict[str, str | Path] = {}
        if not disable_logging and writes_files(logger, wandb_project):
            folders["log_dir"] = log_dir
        if checkpoint_interval is not None:
            _check_keepable(experiment.strategy)
            folders["save_dir"] = save_dir
        for setting, folder in folders.items():
            check_folder(setting, folder)
            check_folder(setting, Path(folder) / (run_name or ""))
        naming = RunFolders(
            experiment.strategy, run_name, saved, log_dir, save_dir, claims=folders.values()
        )
        if "log_dir" in folders:
            naming.check_logs()
        callbacks = Callbacks(
            config={"run_name": naming.name, **config_of(experiment), "val_size": val_size},
            identity=identity,
            name=None if disable_logging else naming.name,
            val_interval=val_interval,
            correlation_interval=correlation_interval,
            checkpoint_interval=checkpoint_interval,
            resumed=saved,
        )
        if checkpoint_interval is not None:
            callbacks.checkpoints = naming.checkpoints(keep_checkpoints)
        if self.val_dataset is not None and val_size:
            callbacks.validator = Validator(experiment, val_size)
        if not disable_logging:
            callbacks.loggers = chosen(logger, wandb_project, naming.logs, axis=log_x_axis)
        with callbacks:
            run = _in_processes if processes else _in_rows
            try:
                self.result = run(experiment, callbacks)
            except BaseException:
                self.result = callbacks.result
                raise
        assert self.result.model is not None
        return self.result.model

    def find_minibatch_size(
        self, num_nodes: int, batch_size: int, force_recalculate: bool = False
    ) -> int:
        """How many samples can go through the model at once. Remembered."""
        experiment = self._experiment(
            strategy=Strategy([]), num_nodes=num_nodes, batch_size=batch_size, max_steps=1
        )
        return self._minibatch_size(experiment, force=force_recalculate)

    def clear_minibatch_cache(self) -> None:
        """Forget the sizes that `find_minibatch_size` has found."""
        self._minibatch_sizes.clear()

    def _set_minibatch_size(
        self, experiment: Experiment, saved: Saved | None, *, force: bool
    ) -> None:
        """The given one, else that of the run that resumes, else what fits. None is the batch."""
        if experiment.micro_batch_size is not None:
            return
        if saved is not None:
            experiment.micro_batch_size = saved.identity["micro_batch_size"]
            return
        size = self._minibatch_size(experiment, force=force)
        experiment.micro_batch_size = None if size == experiment.batch_size else size

    def _minibatch_size(self, experiment: Experiment, *, force: bool = False) -> int:
        key = (
            experiment.num_nodes,
            experiment.batch_size,
            experiment.torch_device,
            experiment.autocast_dtype,
        )
        if force or key not in self._minibatch_sizes:
            self._minibatch_sizes[key] = fitting_size(experiment)
        return self._minibatch_sizes[key]

    def _experiment(
        self, *, device: torch.device | str | None = None, several: bool = False, **settings: Any
    ) -> Experiment:
        if not device:
            device = chosen_device(self.device, self.devices, several=several)
        return Experiment(
            model=self.model,
            train_dataset=self.train_dataset,
            val_dataset=self.val_dataset,
            node_cls=self.node_cls,
            device=device,
            **settings,
        )


_T = TypeVar("_T")


def _needed(name: str, value: _T | None) -> _T:
    if value is None:
        raise SettingsError(f"fit needs {name}=…")
    return value


def _check_interval(name: str, value: int | None, least: int = 1) -> None:
    if value is not None:
        check_integer(name, value, least=least)


def _check_processes(
    experiment: Experiment,
    checkpoint_interval: int | None,
    correlation_interval: int | None,
    resume: bool | str | Path,
) -> None:
    """Refuse what looks into nodes between steps: they are processes of their own."""
    asked = {
        "checkpoint_interval": checkpoint_interval is not None,
        "correlation_interval": correlation_interval is not None,
        "resume": resume is not False,
    }
    for name in (name for name, given in asked.items() if given):
        raise SettingsError(f"{name} is for nodes of one process: leave it out with processes=True")


def _check_keepable(strategy: Strategy) -> None:
    for recipe in strategy.recipes:
        if not recipe.rests:
            raise SettingsError(
                f"{type(recipe).__name__} has delay={recipe.delay}, so a round is in flight after "
                "every step, and none can be kept: use a smaller delay, or leave "
                "checkpoint_interval out"
            )


def _check_steps_left(saved: Saved, experiment: Experiment) -> None:
    if saved.step > experiment.total_steps:
        raise SettingsError(
            f"{saved.path} has {saved.step} steps behind it, more than the "
            f"{experiment.total_steps} of this run: give a larger max_steps or num_epochs"
        )


def _in_rows(experiment: Experiment, callbacks: Callbacks) -> Result:
    saved = callbacks.resumed
    resume = None if saved is None else saved.state["run"]
    return run_stacked(experiment, on_step=callbacks, resume=resume)


def _in_processes(experiment: Experiment, callbacks: Callbacks) -> Result:
    """Looked at before the first step and after the last one, unless a program does it itself."""
    from torchft.experiments.processes import run_processes

    callbacks.show(experiment.total_steps)
    if isinstance(experiment.strategy, SPMDStrategy):
        experiment.strategy.validator = callbacks.validator
        experiment.strategy.val_interval = callbacks.val_interval
    result = run_processes(experiment, keep=callbacks.keep)
    callbacks.keep(result)
    if callbacks.validator is not None and not result.validations:
        model = experiment.make_model()
        first = [experiment.make_node(model, node) for node in range(experiment.num_nodes)]
        last = [experiment.make_node(result.models[node], node) for node in result.alive]
        result.validations = [
            callbacks.look(first, 0),
            callbacks.look(last, experiment.total_steps),
        ]
    callbacks.tell(result, experiment.batch_size)
    return result
