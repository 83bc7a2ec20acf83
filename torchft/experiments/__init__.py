"""Training runs from a model and a dataset to losses, logs, checkpoints and plots.

    from torchft.experiments import Trainer
    from torchft.strategies import DiLoCoStrategy

    model = Trainer(model, train_dataset, val_dataset).fit(1, DiLoCoStrategy(H=20), num_nodes=4)

The nodes are simulated by `torchft.simulator`, or run as real processes on this machine. Names load
when they are first used, so `import torchft.experiments` is light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchft.lazy_names import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "diloco_simulator": ["DilocoSimulator", "DilocoSimulatorConfig", "EvalStats", "TrainStats"],
        "loggers": ["CSVLogger", "Logger", "TensorBoardLogger", "WandbLogger"],
        "machine": ["describe_machine"],
        "processes": ["run_processes"],
        "spmd.node": ["SPMDNode"],
        "trainer": ["Trainer"],
    },
    old={"zoo": "torchft.experiments.models"},
)
