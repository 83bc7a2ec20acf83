"""Scripts in the shapes that people write for EXO Gym: only their imports are ours.

Data and models are tiny; calls, arguments and their names are what such scripts have.
"""

from __future__ import annotations

import csv
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import odd, pairs
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from torchft.compat.exogym.aux.utils import get_device
from torchft.compat.exogym.strategy.communicate import all_reduce, broadcast
from torchft.compat.exogym.strategy.demo import DeMoStrategy
from torchft.compat.exogym.strategy.diloco import DiLoCoStrategy
from torchft.compat.exogym.strategy.federated_averaging import FedAvgStrategy
from torchft.compat.exogym.strategy.optim import OptimSpec
from torchft.compat.exogym.strategy.sparta import SPARTAStrategy
from torchft.compat.exogym.strategy.sparta_diloco import SPARTADiLoCoStrategy
from torchft.compat.exogym.strategy.strategy import SimpleReduceStrategy, Strategy
from torchft.compat.exogym.trainer import Trainer
from torchft.experiments import local_nodes

COSINE: dict[str, Any] = {
    "lr_scheduler": "lambda_cosine",
    "lr_scheduler_kwargs": {"warmup_steps": 2, "cosine_anneal": True},
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    # A session of tests has threads by now; scripts have none, and fork.
    monkeypatch.setattr(local_nodes, "_can_fork", lambda: True)


class Images(nn.Module):
    """A backbone, and around it what takes a batch and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout2d(0.2))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, 3))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.classifier(self.features(images)), labels)


def images(samples: int) -> TensorDataset:
    torch.manual_seed(samples)
    return TensorDataset(torch.randn(samples, 1, 8, 8), torch.randint(0, 3, (samples,)))


def learned(trainer: Trainer, steps: int) -> bool:
    assert trainer.result is not None
    return len(trainer.result.history) == steps and bool(trainer.result.validations)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_call_makes_three_strategies_and_their_curves_are_read_from_csv() -> None:
    """The sweep over pictures: H and p go to all, whether they have such or not."""
    final = {}
    for name, cls in [
        ("ddp", SimpleReduceStrategy),
        ("diloco", DiLoCoStrategy),
        ("sparta", SPARTAStrategy),
    ]:
        trainer = Trainer(Images(), images(96), held_out := images(20))
        made: Any = cls
        strategy = made(
            optim_spec=OptimSpec(torch.optim.AdamW, lr=3e-4, weight_decay=1e-4),
            H=3,
            p=0.05,
            **COSINE,
        )
        trainer.fit(
            max_steps=6,
            num_epochs=5,
            strategy=strategy,
            num_nodes=4,
            device="cpu",
            batch_size=4,
            val_size=len(held_out),
            val_interval=2,
            wandb_project=None,
            run_name=f"pictures_{name}",
        )
        with Path("logs", f"pictures_{name}", "validation.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("global_loss")]
        assert [int(row["step"]) for row in rows] == [0, 2, 4, 6]
        final[name] = float(rows[-1]["global_loss"])
    assert len(final) == 3


def text_of(block: int, start: float, end: float) -> Dataset[Any]:
    tokens = torch.arange(240) % 7
    part = tokens[int(start * 240) : int(end * 240)]
    windows = part.unfold(0, block + 1, 1)
    return TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


def shard(
    block: int, low: float, high: float, rank: int, num_nodes: int, train_dataset: bool
) -> Dataset[Any]:
    if not train_dataset:
        return text_of(block, 0.9, 1.0)
    width = (high - low) / num_nodes
    return text_of(block, low + rank * width, low + (rank + 1) * width)


class Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        logits = self.head(self.embed(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def chosen(name: str, lr: float = 1e-3) -> Any:
    """The strategies of the language model's command line, with its keywords."""
    adamw = OptimSpec(torch.optim.AdamW, lr=lr)
    outer = OptimSpec(torch.optim.SGD, lr=0.7, nesterov=True, momentum=0.9)
    common = {"max_norm": 1.0, **COSINE}
    if name == "ddp":
        return SimpleReduceStrategy(optim_spec=adamw, **common)
    if name == "fedavg":
        return FedAvgStrategy(inner_optim_spec=adamw, H=2, island_size=4, **common)
    if name == "sparta":
        anything: Any = {"p_sparta": 0.1, "async_sparta_delay": 0}
        return SPARTAStrategy(optim_spec=adamw, **anything, **common)
    if name == "diloco":
        return DiLoCoStrategy(optim_spec=adamw, outer_optim_spec=outer, H=2, **common)
    if name == "demo":
        return DeMoStrategy(
            optim_spec=OptimSpec(torch.optim.AdamW, lr=lr, weight_decay=0.0),
            compression_decay=0.999,
            compression_topk=32,
            compression_chunk=64,
            weight_decay=0.0,
            **common,
        )
    return SPARTADiLoCoStrategy(
        inner_optim_spec=adamw,
        outer_optim_spec=outer,
        H=2,
        p_sparta=0.1,
        sparta_interval=1,
        **common,
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["ddp", "fedavg", "sparta", "diloco", "demo", "diloco_sparta"])
def test_a_language_model_on_shards_of_its_own(name: str) -> None:
    factory = partial(shard, 4, 0.0, 0.9)
    trainer = Trainer(Characters(), factory, factory, start_port=15000)
    model = trainer.fit(
        num_epochs=1,
        max_steps=4,
        strategy=chosen(name),
        num_nodes=4,
        device="",
        batch_size=4,
        minibatch_size=None,
        shuffle=name != "ddp",
        val_size=8,
        val_interval=100,
        correlation_interval=None,
        save_dir="./checkpoints",
        wandb_project=None,
        run_name=f"{name}_bs4",
        log_x_axis="step",
    )
    torch.save(model.state_dict(), "model.pt")
    assert learned(trainer, 4)


@pytest.mark.filterwarnings("ignore:CUDA:UserWarning")
def test_the_number_of_nodes_grows_at_equal_tokens() -> None:
    """Nobody reads fit(kwargs=…), there as here; here that is said."""
    data = text_of(4, 0.0, 0.9)
    for index, nodes in enumerate([0, 1, 2, 4]):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer = Trainer(Characters(), data, text_of(4, 0.9, 1.0), start_port=12355 + index)
            adamw = OptimSpec(torch.optim.AdamW, lr=1e-3 if nodes > 1 else 6e-4)
            strategy: Any = (
                SimpleReduceStrategy(optim_spec=adamw, max_norm=1.0, **COSINE)
                if nodes == 0
                else DiLoCoStrategy(optim_spec=adamw, max_norm=1.0, H=2, **COSINE)
            )
            trainer.fit(
                num_epochs=1,
                max_steps=3,
                strategy=strategy,
                num_nodes=max(1, nodes),
                device=get_device(),
                batch_size=8 // max(1, nodes),
                shuffle=True,
                val_size=8,
                val_interval=128,
                wandb_project="scaling",
                run_name=f"nodes{nodes}",
                log_x_axis="examples",
                kwargs={"dataset_name": "text"},
            )
        assert sum("fit(kwargs=" in str(one.message) for one in said) == 1
        assert learned(trainer, 3)


class OfRecords(Dataset[Any]):
    """A set of records behind a transform, as of a hub."""

    def __init__(self, records: TensorDataset, scale: float) -> None:
        self.records, self.scale = records, scale

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.records[index]
        return image * self.scale, int(label)


def pictures_of(subset: float, rank: int, num_nodes: int, train_dataset: bool) -> Dataset[Any]:
    data = OfRecords(images(96 if train_dataset else 20), 2.0)
    if not train_dataset:
        return data
    kept = list(range(int(len(data) * subset)))
    return Subset(data, kept[rank::num_nodes])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pictures_of_a_factory_by_loaders_with_workers() -> None:
    factory = partial(pictures_of, 0.5)
    trainer = Trainer(Images(), factory, factory)
    trainer.fit(
        num_epochs=1,
        max_steps=2,
        strategy=chosen("sparta"),
        num_nodes=2,
        device="cpu",
        batch_size=4,
        minibatch_size=2,
        shuffle=True,
        val_size=8,
        val_interval=200,
        run_name="records",
        dataloader_kwargs={
            "num_workers": 1,
            "pin_memory": False,
            "persistent_workers": True,
            "prefetch_factor": 4,
        },
    )
    assert learned(trainer, 2)


class Masked(Strategy):
    """The playground: SPARTA from scratch. The base class makes the optimizer."""

    def __init__(self, optim_spec: OptimSpec, p_sparta: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.optim_spec, self.p_sparta = optim_spec, p_sparta

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if not parameter.requires_grad or parameter.grad is None:
                    continue
                share = torch.full(parameter.shape, self.p_sparta)
                mask = torch.bernoulli(share).bool()
                broadcast(mask, src=0)
                chosen_ones = parameter.data[mask]
                all_reduce(chosen_ones, op=torch.distributed.ReduceOp.SUM)
                chosen_ones /= self.num_nodes
                parameter.masked_scatter_(mask, chosen_ones)
        self.optim.step()
        super().step()


def test_a_strategy_from_scratch_is_run_over_processes_without_being_asked() -> None:
    trainer = Trainer(odd(), pairs(), pairs(20))
    strategy = Masked(OptimSpec(torch.optim.AdamW, lr=4e-4), max_norm=1.0, p=0.005, **COSINE)
    model = trainer.fit(
        num_epochs=1,
        max_steps=4,
        strategy=strategy,
        num_nodes=2,
        device="cpu",
        batch_size=8,
        minibatch_size=4,
        shuffle=False,
        val_size=16,
        val_interval=100,
        wandb_project="sparta",
        run_name="sparta-run",
    )
    assert learned(trainer, 4) and isinstance(model, type(odd()))
    assert trainer.result is not None
    assert min(trainer.result.bytes_sent) > 0
    rates = [row.lr for row in trainer.result.history]
    assert rates[:2] == pytest.approx([2e-4, 4e-4])
