"""Distributed training of N nodes in one process, by the strategies that real groups run.

    from torchft.simulator import Trainer
    from torchft.strategies import DiLoCoStrategy

    model = Trainer(model, train_dataset, val_dataset).fit(1, DiLoCoStrategy(H=20), num_nodes=4)

`Experiment` and `run_stacked` are the same without validation, logs and checkpoints.

Names load when they are first used, so `import torchft.simulator` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchft.simulator.diloco_simulator import (
        DilocoSimulator,
        DilocoSimulatorConfig,
        EvalStats,
        TrainStats,
    )
    from torchft.simulator.events import Dies, Discards, Joins, Misses
    from torchft.simulator.experiment import Experiment
    from torchft.simulator.feed import Feed
    from torchft.simulator.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
    from torchft.simulator.loop import Run, run_stacked
    from torchft.simulator.machine import describe_machine
    from torchft.simulator.network import SimulatedRun, forecast
    from torchft.simulator.node import NodeError, TrainNode
    from torchft.simulator.processes import run_processes
    from torchft.simulator.replay import events_of
    from torchft.simulator.result import Result
    from torchft.simulator.spmd.node import SPMDNode
    from torchft.simulator.spmd.program import SPMDProgram
    from torchft.simulator.trainer import Trainer
    from torchft.simulator.weather import NodeWeather, RandomFailures, Weather, WeatherEvent

__all__ = [
    "CSVLogger",
    "Dies",
    "DilocoSimulator",
    "DilocoSimulatorConfig",
    "Discards",
    "EvalStats",
    "Experiment",
    "Feed",
    "Joins",
    "Logger",
    "Misses",
    "NodeError",
    "NodeWeather",
    "RandomFailures",
    "Result",
    "Run",
    "SPMDNode",
    "SPMDProgram",
    "SimulatedRun",
    "TensorBoardLogger",
    "TrainNode",
    "TrainStats",
    "Trainer",
    "WandbLogger",
    "Weather",
    "WeatherEvent",
    "describe_machine",
    "events_of",
    "forecast",
    "run_processes",
    "run_stacked",
]

_HOMES = {
    "CSVLogger": "loggers",
    "Dies": "events",
    "DilocoSimulator": "diloco_simulator",
    "DilocoSimulatorConfig": "diloco_simulator",
    "Discards": "events",
    "EvalStats": "diloco_simulator",
    "Experiment": "experiment",
    "Feed": "feed",
    "Joins": "events",
    "Logger": "loggers",
    "Misses": "events",
    "NodeError": "node",
    "NodeWeather": "weather",
    "RandomFailures": "weather",
    "Result": "result",
    "Run": "loop",
    "SPMDNode": "spmd.node",
    "SPMDProgram": "spmd.program",
    "SimulatedRun": "network",
    "TensorBoardLogger": "loggers",
    "TrainNode": "node",
    "TrainStats": "diloco_simulator",
    "Trainer": "trainer",
    "WandbLogger": "loggers",
    "Weather": "weather",
    "WeatherEvent": "weather",
    "describe_machine": "machine",
    "events_of": "replay",
    "forecast": "network",
    "run_processes": "processes",
    "run_stacked": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchft.simulator' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"torchft.simulator.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
