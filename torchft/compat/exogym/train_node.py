"""`exogym.train_node`."""

from torchft.simulator.node import TrainNode

__all__ = ["TrainNode"]
