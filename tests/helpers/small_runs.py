"""Small runs of the simulator: a model with all that is awkward, a little data, every strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torchft.digest import digest
from torchft.experiments import Trainer
from torchft.experiments.loggers import Kind, Row
from torchft.simulator.result import Result
from torchft.strategies import (
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    IndexSelector,
    LocalSGDStrategy,
    OptimSpec,
    PartitionedIndexSelector,
    ShuffledSequentialIndexSelector,
    SimpleReduceStrategy,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    Strategy,
    StreamingDiLoCoStrategy,
    TopKStrategy,
)

__all__ = ["STRATEGIES", "Fits", "Interrupt", "Odd", "bits", "fit", "odd", "pairs"]

COSINE: dict[str, Any] = {
    "lr_scheduler": "lambda_cosine",
    "lr_scheduler_kwargs": {"warmup_steps": 3, "cosine_anneal": True},
}
STEPS: dict[str, Any] = {
    "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR,
    "lr_scheduler_kwargs": {"milestones": [4, 11]},
}
SGD = OptimSpec(torch.optim.SGD, lr=0.05, momentum=0.9)

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "all_reduce": lambda: SimpleReduceStrategy(SGD, max_norm=1.0, **COSINE),
    "fedavg": lambda: FedAvgStrategy(H=4, **STEPS),
    "fedavg_islands": lambda: FedAvgStrategy(H=4, island_size=2),
    "local_sgd": lambda: LocalSGDStrategy(H=4),
    "diloco": lambda: DiLoCoStrategy(H=4, max_norm=0.5, **COSINE),
    "streaming": lambda: StreamingDiLoCoStrategy(H=6, fragments=3),
    "streaming_late": lambda: StreamingDiLoCoStrategy(H=7, fragments=2, delay=2, mix=0.5),
    "sparta": lambda: SPARTAStrategy(p_sparta=0.2),
    "sparta_all": lambda: SPARTAStrategy(index_selector=IndexSelector(), sparta_interval=3),
    "sparta_sequential": lambda: SPARTAStrategy(
        index_selector=ShuffledSequentialIndexSelector(0.2)
    ),
    "sparta_partitioned": lambda: SPARTAStrategy(index_selector=PartitionedIndexSelector(0.2)),
    "sparta_diloco": lambda: SPARTADiLoCoStrategy(p_sparta=0.2, sparta_interval=2, H=4),
    "demo": lambda: DeMoStrategy(compression_topk=4, compression_chunk=8),
    "topk": lambda: TopKStrategy(H=4, topk=4, chunk=32),
}


class Fits(nn.Module):
    """A line whose loss is the mean of its squares."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, batch: Tensor) -> Tensor:
        return self.line(batch).pow(2).mean()


class Odd(nn.Module):
    """Odd sizes, a BatchNorm, dropout, a tied weight, an unused and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.square = nn.Linear(5, 5)
        self.again = nn.Linear(5, 5)
        self.again.weight = self.square.weight
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        x, y = batch
        hidden = torch.tanh(self.norm(self.into(x))) * self.frozen
        hidden = self.dropout(torch.tanh(self.again(torch.tanh(self.square(hidden)))))
        return nn.functional.cross_entropy(self.out(hidden), y)


def odd() -> Odd:
    """Always the same one."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Odd()


def pairs(samples: int = 80) -> TensorDataset:
    """Inputs and classes that can be learnt."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 7, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def fit(
    model: Any = None,
    data: Any = None,
    val: Any = None,
    on: dict[str, Any] | None = None,
    **of: Any,
) -> Trainer:
    """A trainer that fitted DiLoCo at two nodes; `on` are its own options, `of` those of `fit`."""
    trainer = Trainer(model or odd(), data or pairs(), val, **{"device": "cpu", **(on or {})})
    settings = {"strategy": DiLoCoStrategy(H=4), "num_nodes": 2, "max_steps": 6, "batch_size": 8}
    trainer.fit(**{"run_name": "run", **settings, **of})
    return trainer


def bits(result: Result) -> str:
    """A digest of all that a run leaves but the time it took."""
    return digest(
        {
            "models": [dict(model.state_dict()) for model in result.models],
            "mean": dict(result.model.state_dict()) if result.model is not None else None,
            "history": [(row.step, row.losses, row.lr) for row in result.history],
            "validations": result.validations,
            "correlations": result.correlations,
            "bytes": result.bytes_sent,
            "rounds": [(r.step, list(r.members), r.committed) for r in result.rounds],
            "heals": [(heal.step, heal.node, heal.donor) for heal in result.heals],
            "alive": result.alive,
        }
    )


class Interrupt:
    """A logger that stops the run after so many steps, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self._after = after

    def start(self, config: Mapping[str, Any], past: Sequence[tuple[Kind, Row]]) -> None:
        pass

    def log(self, kind: Kind, row: Row) -> None:
        if kind == "train" and row["step"] == self._after:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass
