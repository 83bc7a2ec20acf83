"""N nodes of a training in one process, by the strategies that real groups run.

    result = run_stacked(Experiment(...), strategy)

`torchft.experiments.Trainer` adds validation, logs and checkpoints. Names load when they are first
used, so `import torchft.simulator` is light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchft.lazy_names import lazy_names

if TYPE_CHECKING:
    from torchft.simulator.events import Dies, Discards, Joins, Misses
    from torchft.simulator.experiment import Experiment
    from torchft.simulator.faults import FaultEvent, NodeProfile, RandomFailures, Weather
    from torchft.simulator.feed import Feed
    from torchft.simulator.forecast import Forecast, forecast
    from torchft.simulator.loop import Simulation, run_stacked
    from torchft.simulator.node import NodeError, TrainNode
    from torchft.simulator.program import SPMDProgram
    from torchft.simulator.replay import events_of
    from torchft.simulator.result import Result

__all__ = [
    "Dies",
    "Discards",
    "Experiment",
    "FaultEvent",
    "Feed",
    "Forecast",
    "Joins",
    "Misses",
    "NodeError",
    "NodeProfile",
    "RandomFailures",
    "Result",
    "SPMDProgram",
    "Simulation",
    "TrainNode",
    "Weather",
    "events_of",
    "forecast",
    "run_stacked",
]

_EXPERIMENTS = (
    *("CSVLogger", "DilocoSimulator", "DilocoSimulatorConfig", "EvalStats", "Logger", "SPMDNode"),
    *("TensorBoardLogger", "TrainStats", "Trainer", "WandbLogger", "datasets"),
    *("describe_machine", "run_processes"),
)

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "events": ["Dies", "Discards", "Joins", "Misses"],
        "experiment": ["Experiment"],
        "faults": ["FaultEvent", "NodeProfile", "RandomFailures", "Weather"],
        "feed": ["Feed"],
        "forecast": ["Forecast", "forecast"],
        "loop": ["Simulation", "run_stacked"],
        "node": ["NodeError", "TrainNode"],
        "program": ["SPMDProgram"],
        "replay": ["events_of"],
        "result": ["Result"],
    },
    old={
        **{name: f"torchft.experiments.{name}" for name in _EXPERIMENTS},
        "NodeWeather": "torchft.simulator.NodeProfile",
        "Run": "torchft.simulator.Simulation",
        "SimulatedRun": "torchft.simulator.Forecast",
        "WeatherEvent": "torchft.simulator.FaultEvent",
        "zoo": "torchft.experiments.models",
    },
)
