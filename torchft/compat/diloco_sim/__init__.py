"""diloco-sim's paths: in a script, `diloco_sim` becomes `torchft.compat.diloco_sim`."""

from __future__ import annotations

from torchft.experiments.diloco_simulator import (
    DilocoSimulator,
    DilocoSimulatorConfig,
    EvalStats,
    TrainStats,
)

__all__ = ["DilocoSimulator", "DilocoSimulatorConfig", "EvalStats", "TrainStats"]
