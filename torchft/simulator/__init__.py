"""N nodes of a training in one process, by the strategies that real groups run.

    result = run_stacked(Experiment(...), strategy)

`torchft.experiments.Trainer` adds validation, logs and checkpoints. Names load when they are first
used, so `import torchft.simulator` is light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchft.lazy_names import lazy_names, old_modules

if TYPE_CHECKING:
    from torchft.simulator.events import Dies, Discards, Joins, Misses
    from torchft.simulator.experiment import Experiment
    from torchft.simulator.faults import FaultEvent, FaultSchedule, RandomFailures
    from torchft.simulator.feed import Feed
    from torchft.simulator.loop import Simulation, run_stacked
    from torchft.simulator.network import NetworkModel, NodeProfile
    from torchft.simulator.node import NodeError, TrainNode
    from torchft.simulator.program import SPMDProgram
    from torchft.simulator.replay import events_of
    from torchft.simulator.result import Result
    from torchft.simulator.simulated_time import Forecast, forecast

__all__ = [
    "Dies",
    "Discards",
    "Experiment",
    "FaultEvent",
    "FaultSchedule",
    "Feed",
    "Forecast",
    "Joins",
    "Misses",
    "NetworkModel",
    "NodeError",
    "NodeProfile",
    "RandomFailures",
    "Result",
    "SPMDProgram",
    "Simulation",
    "TrainNode",
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
        "faults": ["FaultEvent", "FaultSchedule", "RandomFailures"],
        "feed": ["Feed"],
        "simulated_time": ["Forecast", "forecast"],
        "loop": ["Simulation", "run_stacked"],
        "network": ["NetworkModel", "NodeProfile"],
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
        "Weather": "torchft.simulator.weather.Weather",
        "WeatherEvent": "torchft.simulator.FaultEvent",
    },
)
old_modules(__name__, {"zoo": "torchft.experiments.models"})
