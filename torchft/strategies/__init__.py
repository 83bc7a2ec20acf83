"""One family of strategies: what is communicated, when, and how it is applied.

Each is a short recipe over the same two joints: `Local`, the weights at home, and `Peers`, the
other nodes. A strategy knows neither the manager nor a process group, so the same object runs over
both and over peers that live in one process.
"""

from torchft.strategies.all_reduce import AllReduce
from torchft.strategies.diloco import DiLoCo
from torchft.strategies.local import Fragment, Layout, Local
from torchft.strategies.local_sgd import LocalSGD
from torchft.strategies.model_local import ModelLocal
from torchft.strategies.recipe import By, Clock, Recipe
from torchft.strategies.strategy import Strategy

__all__ = [
    "AllReduce",
    "By",
    "Clock",
    "DiLoCo",
    "Fragment",
    "Layout",
    "Local",
    "LocalSGD",
    "ModelLocal",
    "Recipe",
    "Strategy",
]
