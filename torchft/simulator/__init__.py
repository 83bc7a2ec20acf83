"""N nodes of a training in one process, by the strategies that real groups run.

    result = run_stacked(Experiment(...), strategy)

`torchft.experiments.Trainer` adds validation, logs and checkpoints. Names load when they are first
used, so `import torchft.simulator` is light.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchft.simulator.events import Dies, Discards, Joins, Misses
    from torchft.simulator.experiment import Experiment
    from torchft.simulator.feed import Feed
    from torchft.simulator.loop import Run, run_stacked
    from torchft.simulator.network import SimulatedRun, forecast
    from torchft.simulator.node import NodeError, TrainNode
    from torchft.simulator.program import SPMDProgram
    from torchft.simulator.replay import events_of
    from torchft.simulator.result import Result
    from torchft.simulator.weather import NodeWeather, RandomFailures, Weather, WeatherEvent

__all__ = [
    "Dies",
    "Discards",
    "Experiment",
    "Feed",
    "Joins",
    "Misses",
    "NodeError",
    "NodeWeather",
    "RandomFailures",
    "Result",
    "Run",
    "SPMDProgram",
    "SimulatedRun",
    "TrainNode",
    "Weather",
    "WeatherEvent",
    "events_of",
    "forecast",
    "run_stacked",
]

_HOMES = {
    "Dies": "events",
    "Discards": "events",
    "Experiment": "experiment",
    "Feed": "feed",
    "Joins": "events",
    "Misses": "events",
    "NodeError": "node",
    "NodeWeather": "weather",
    "RandomFailures": "weather",
    "Result": "result",
    "Run": "loop",
    "SPMDProgram": "program",
    "SimulatedRun": "network",
    "TrainNode": "node",
    "Weather": "weather",
    "WeatherEvent": "weather",
    "events_of": "replay",
    "forecast": "network",
    "run_stacked": "loop",
}

_MOVED = {
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
    "datasets",
    "describe_machine",
    "run_processes",
    "zoo",
}
"""Names of `torchft.experiments` that used to be here."""


def __getattr__(name: str) -> Any:
    if name in _MOVED:
        warnings.warn(
            f"torchft.simulator.{name} is now torchft.experiments.{name}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module("torchft.experiments"), name)
    if name not in _HOMES:
        raise AttributeError(f"module 'torchft.simulator' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"torchft.simulator.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
