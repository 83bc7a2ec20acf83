"""EXO Gym's paths: in a script, `exogym` becomes `torchft.compat.exogym`, and nothing else changes.

Strategies by name run as rows of one process. An own subclass of `strategy.Strategy` calls
collectives on `self.model`, so `Trainer.fit` runs it over a real process for each node.
"""

from __future__ import annotations

from torchft.compat.exogym.train_node import TrainNode
from torchft.compat.exogym.trainer import LocalTrainer, Trainer

__all__ = ["LocalTrainer", "TrainNode", "Trainer"]
