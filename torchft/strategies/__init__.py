"""One family of strategies: what is communicated, when, and how it is applied.

Each is a short recipe over the same two joints: `Local`, the weights at home, and `Peers`, the
other nodes. A strategy knows neither the manager nor a process group, so the same object runs over
both and over peers that live in one process.
"""

from torchft.strategies.all_reduce import AllReduce
from torchft.strategies.demo import DeMo
from torchft.strategies.diloco import DiLoCo
from torchft.strategies.fedavg import FedAvg
from torchft.strategies.gym import (
    DiLoCoStrategy,
    FedAvgStrategy,
    LocalSGDStrategy,
    SimpleReduceStrategy,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    StreamingDiLoCoStrategy,
)
from torchft.strategies.gym_gathered import DeMoStrategy, TopKStrategy
from torchft.strategies.inner import Inner, InnerOptimizer
from torchft.strategies.local import Fragment, Layout, Local
from torchft.strategies.local_sgd import LocalSGD
from torchft.strategies.lr_schedule import ScheduleSpec
from torchft.strategies.model_local import ModelLocal
from torchft.strategies.optim_spec import OptimSpec, ensure_optim_spec
from torchft.strategies.parts.selectors import (
    IndexSelector,
    PartitionedIndexSelector,
    RandomIndexSelector,
    ShuffledSequentialIndexSelector,
)
from torchft.strategies.recipe import By, Clock, Recipe
from torchft.strategies.sparta import Sparta
from torchft.strategies.strategy import Strategy
from torchft.strategies.top_k import TopK

__all__ = [
    "AllReduce",
    "By",
    "Clock",
    "DeMo",
    "DeMoStrategy",
    "DiLoCo",
    "DiLoCoStrategy",
    "FedAvg",
    "FedAvgStrategy",
    "Fragment",
    "IndexSelector",
    "Inner",
    "InnerOptimizer",
    "Layout",
    "Local",
    "LocalSGD",
    "LocalSGDStrategy",
    "ModelLocal",
    "OptimSpec",
    "PartitionedIndexSelector",
    "RandomIndexSelector",
    "Recipe",
    "SPARTADiLoCoStrategy",
    "SPARTAStrategy",
    "ScheduleSpec",
    "ShuffledSequentialIndexSelector",
    "SimpleReduceStrategy",
    "Sparta",
    "Strategy",
    "StreamingDiLoCoStrategy",
    "TopK",
    "TopKStrategy",
    "ensure_optim_spec",
]
