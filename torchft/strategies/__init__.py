"""One family of strategies: what is communicated, when, and how it is applied.

Each is a short recipe over the same two joints: `Local`, this process's weights, and `Peers`, the
other nodes. A strategy knows neither the manager nor a process group, so the same object runs over
both and over peers that live in one process.
"""

from torchft.lazy_names import lazy_names
from torchft.strategies.all_reduce import AllReduceRecipe
from torchft.strategies.demo import DeMoRecipe
from torchft.strategies.diloco import DiLoCoRecipe
from torchft.strategies.fedavg import FedAvgRecipe
from torchft.strategies.gym import (
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    LocalSGDStrategy,
    SimpleReduceStrategy,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    StreamingDiLoCoStrategy,
    TopKStrategy,
)
from torchft.strategies.inner import Inner, InnerOptimizer
from torchft.strategies.local import Fragment, Layout, Local
from torchft.strategies.local_sgd import LocalSGDRecipe
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
from torchft.strategies.sparta import SpartaRecipe
from torchft.strategies.strategy import Strategy
from torchft.strategies.top_k import TopKRecipe

__all__ = [
    "AllReduceRecipe",
    "By",
    "Clock",
    "DeMoRecipe",
    "DeMoStrategy",
    "DiLoCoRecipe",
    "DiLoCoStrategy",
    "FedAvgRecipe",
    "FedAvgStrategy",
    "Fragment",
    "IndexSelector",
    "Inner",
    "InnerOptimizer",
    "Layout",
    "Local",
    "LocalSGDRecipe",
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
    "SpartaRecipe",
    "Strategy",
    "StreamingDiLoCoStrategy",
    "TopKRecipe",
    "TopKStrategy",
    "ensure_optim_spec",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {},
    old={
        "AllReduce": "torchft.strategies.AllReduceRecipe",
        "DeMo": "torchft.strategies.DeMoRecipe",
        "DiLoCo": "torchft.strategies.DiLoCoRecipe",
        "FedAvg": "torchft.strategies.FedAvgRecipe",
        "LocalSGD": "torchft.strategies.LocalSGDRecipe",
        "Sparta": "torchft.strategies.SpartaRecipe",
        "TopK": "torchft.strategies.TopKRecipe",
    },
)
