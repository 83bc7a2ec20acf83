"""The names, arguments and paths of other systems, for scripts that were written for them.

    exogym        EXO Gym: replace `exogym` by `torchft.compat.exogym` in a script's imports
    diloco_sim    diloco-sim: replace `diloco_sim` by `torchft.compat.diloco_sim`

What is new code is better written with `torchft.simulator` and `torchft.strategies`, where an
argument that a name does not know is always an error.
"""

from __future__ import annotations

from torchft.compat.exogym import LocalTrainer, Trainer, TrainNode
from torchft.compat.exogym.aux.utils import get_device
from torchft.compat.exogym.strategy import (
    AveragingCommunicator,
    CommunicateOptimizeStrategy,
    CommunicationModule,
    DeMoStrategy,
    DiLoCoCommunicator,
    DiLoCoStrategy,
    FedAvgStrategy,
    OptimSpec,
    SimpleReduceStrategy,
    SparseCommunicator,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    Strategy,
    ensure_optim_spec,
)
from torchft.compat.exogym.strategy.communicate import all_gather, all_reduce, broadcast

__all__ = [
    "AveragingCommunicator",
    "CommunicateOptimizeStrategy",
    "CommunicationModule",
    "DeMoStrategy",
    "DiLoCoCommunicator",
    "DiLoCoStrategy",
    "FedAvgStrategy",
    "LocalTrainer",
    "OptimSpec",
    "SPARTADiLoCoStrategy",
    "SPARTAStrategy",
    "SimpleReduceStrategy",
    "SparseCommunicator",
    "Strategy",
    "TrainNode",
    "Trainer",
    "all_gather",
    "all_reduce",
    "broadcast",
    "ensure_optim_spec",
    "get_device",
]
