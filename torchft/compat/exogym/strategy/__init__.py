"""`exogym.strategy`: strategies by name, and what to write one's own with."""

from __future__ import annotations

from torchft.compat.exogym.strategy.communicate_optimize_strategy import (
    CommunicateOptimizeStrategy,
    CommunicationModule,
)
from torchft.compat.exogym.strategy.demo import DeMoStrategy
from torchft.compat.exogym.strategy.diloco import DiLoCoCommunicator, DiLoCoStrategy
from torchft.compat.exogym.strategy.federated_averaging import (
    AveragingCommunicator,
    FedAvgStrategy,
)
from torchft.compat.exogym.strategy.optim import OptimSpec, ensure_optim_spec
from torchft.compat.exogym.strategy.sparta import SparseCommunicator, SPARTAStrategy
from torchft.compat.exogym.strategy.sparta_diloco import SPARTADiLoCoStrategy
from torchft.compat.exogym.strategy.strategy import SimpleReduceStrategy, Strategy

__all__ = [
    "AveragingCommunicator",
    "CommunicateOptimizeStrategy",
    "CommunicationModule",
    "DeMoStrategy",
    "DiLoCoCommunicator",
    "DiLoCoStrategy",
    "FedAvgStrategy",
    "OptimSpec",
    "SPARTADiLoCoStrategy",
    "SPARTAStrategy",
    "SimpleReduceStrategy",
    "SparseCommunicator",
    "Strategy",
    "ensure_optim_spec",
]
