"""Training runs from a model and a dataset to losses, logs, checkpoints and plots.

    from torchft.experiments import Trainer
    from torchft.strategies import DiLoCoStrategy

    model = Trainer(model, train_dataset, val_dataset).fit(1, DiLoCoStrategy(H=20), num_nodes=4)

The nodes are simulated by `torchft.simulator`, or run as real processes on this machine. Names load
when they are first used, so `import torchft.experiments` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchft.experiments.diloco_simulator import (
        DilocoSimulator,
        DilocoSimulatorConfig,
        EvalStats,
        TrainStats,
    )
    from torchft.experiments.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
    from torchft.experiments.machine import describe_machine
    from torchft.experiments.processes import run_processes
    from torchft.experiments.spmd.node import SPMDNode
    from torchft.experiments.trainer import Trainer

__all__ = [
    "CSVLogger",
    "DilocoSimulator",
    "DilocoSimulatorConfig",
    "EvalStats",
    "Logger",
    "SPMDNode",
    "TensorBoardLogger",
    "TrainStats",
    "Trainer",
    "WandbLogger",
    "describe_machine",
    "run_processes",
]

_HOMES = {
    "CSVLogger": "loggers",
    "DilocoSimulator": "diloco_simulator",
    "DilocoSimulatorConfig": "diloco_simulator",
    "EvalStats": "diloco_simulator",
    "Logger": "loggers",
    "SPMDNode": "spmd.node",
    "TensorBoardLogger": "loggers",
    "TrainStats": "diloco_simulator",
    "Trainer": "trainer",
    "WandbLogger": "loggers",
    "describe_machine": "machine",
    "run_processes": "processes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchft.experiments' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"torchft.experiments.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
