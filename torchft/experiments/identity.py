"""What an experiment is: the settings that decide about its bits, and all of them for a log.

A run goes on from a checkpoint only where the first kind is equal. How long it trains is not among
them, so that a run can be made longer, unless its schedule depends on that.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from torchft.simulator.experiment import Experiment
from torchft.simulator.feed import is_factory
from torchft.strategies.describe import describe, shape_of_model

__all__ = ["config_of", "identity_of"]


def identity_of(experiment: Experiment) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that goes on from it.

    Raises:
        SettingsError: the strategy is in use already, so it is no description of a new run.
    """
    strategy = experiment.strategy
    strategy.check_unused()
    return {
        "strategy": describe(strategy),
        "num_nodes": experiment.num_nodes,
        "batch_size": experiment.batch_size,
        "micro_batch_size": experiment.micro_batch_size,
        "seed": experiment.seed,
        "shuffle": experiment.shuffle,
        "device": experiment.torch_device.type,
        "autocast": describe(experiment.autocast_dtype),
        "node_cls": describe(experiment.node_cls),
        "train_dataset": _data(experiment.train_dataset),
        "batches_per_epoch": experiment.feed().batches_per_epoch,
        "total_steps": experiment.total_steps if _depends_on_length(experiment) else "any",
        "events": [describe(vars(e)) | {"is": type(e).__name__} for e in experiment.all_events()],
        "model": _model(experiment.model),
    }


def config_of(experiment: Experiment) -> dict[str, Any]:
    """All settings of an experiment as plain data."""
    return {
        **identity_of(experiment),
        "strategy": experiment.strategy.config(),
        "total_steps": experiment.total_steps,
        "max_steps": experiment.max_steps,
        "num_epochs": experiment.num_epochs,
        "val_dataset": _data(experiment.val_dataset),
        "device": str(experiment.torch_device),
        "deterministic": experiment.deterministic,
    }


def _depends_on_length(experiment: Experiment) -> bool:
    schedule = experiment.inner.schedule
    if schedule is None or not isinstance(schedule.cls, str):
        return False
    return bool(schedule.kwargs.get("cosine_anneal")) and "max_steps" not in schedule.kwargs


def _data(data: Any) -> Any:
    return describe(data) if is_factory(data) else type(data).__name__


def _model(model: Any) -> Any:
    return shape_of_model(model) if isinstance(model, nn.Module) else describe(model)
