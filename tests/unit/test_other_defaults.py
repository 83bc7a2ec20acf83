"""A script sets `torch.set_default_dtype` and `torch.set_default_device`: nothing of ours changes.

Tensors on `meta` hold no numbers, so a tensor of ours that is made where the script's are is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.defaults import other_defaults
from torch import Tensor, nn

from torchft.quantization import codec_names, codec_of
from torchft.simulator import Experiment, run_stacked
from torchft.strategies import (
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    SimpleReduceStrategy,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    TopKStrategy,
)
from torchft.strategies.parts.dct import basis


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))

    def forward(self, batch: Any) -> Tensor:
        x, y = batch
        return ((self.layers(x) - y) ** 2).mean()


def world() -> tuple[Model, torch.utils.data.TensorDataset]:
    dice = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x, y = (torch.randn(64, 6, generator=dice) for _ in range(2))
    return Model(), torch.utils.data.TensorDataset(x, y)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "all-reduce": SimpleReduceStrategy,
    "FedAvg in islands": lambda: FedAvgStrategy(H=2, island_size=2),
    "DiLoCo": lambda: DiLoCoStrategy(H=2),
    "SPARTA": lambda: SPARTAStrategy(p_sparta=0.3),
    "SPARTA-DiLoCo": lambda: SPARTADiLoCoStrategy(p_sparta=0.3, H=2),
    "DeMo": lambda: DeMoStrategy(compression_topk=4),
    "top-k": lambda: TopKStrategy(topk=4),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_simulation(name: str) -> None:
    def run() -> dict[str, Tensor]:
        model, data = built
        experiment = Experiment(
            model=model,
            train_dataset=data,
            val_dataset=data,
            strategy=STRATEGIES[name](),
            num_nodes=3,
            max_steps=6,
            batch_size=4,
            device="cpu",
        )
        found = run_stacked(experiment)
        return {key: value.clone() for key, value in found.model.state_dict().items()}

    built = world()
    expected = run()
    basis.cache_clear()
    built = world()
    with other_defaults():
        found = run()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", codec_names())
def test_what_travels(name: str) -> None:
    codec = codec_of(name)
    row = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    expected = codec.decode(codec.encode(row), 300)
    with other_defaults():
        assert torch.equal(codec.decode(codec.encode(row), 300), expected)
