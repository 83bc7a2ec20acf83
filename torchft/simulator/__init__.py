"""Distributed training of N nodes in one process, by the strategies that real groups run.

    from torchft.simulator import Experiment, run_stacked

    result = run_stacked(Experiment(model=model, train_dataset=data, strategy=strategy,
                                    num_nodes=4, max_steps=300))

Names load when they are first used, so `import torchft.simulator` is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchft.simulator.events import Dies, Discards, Joins, Misses
    from torchft.simulator.experiment import Experiment
    from torchft.simulator.feed import Feed
    from torchft.simulator.loop import Run, run_stacked
    from torchft.simulator.network import SimulatedRun, forecast
    from torchft.simulator.node import NodeError, TrainNode
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
    "SimulatedRun",
    "TrainNode",
    "Weather",
    "WeatherEvent",
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
    "SimulatedRun": "network",
    "TrainNode": "node",
    "Weather": "weather",
    "WeatherEvent": "weather",
    "forecast": "network",
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
