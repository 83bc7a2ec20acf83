"""A script sets `torch.set_default_dtype` and `torch.set_default_device`: nothing of ours changes.

Tensors on `meta` hold no numbers, so a tensor of ours that is made where the script's are is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ps import Net, options
from helpers.voices import TOKENS, Voice
from torch import Tensor, nn

from torchft.parameter_server import DiLoCoWorker
from torchft.parameter_server.server.server import Address, DiLoCoServer
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


@contextmanager
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


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


@pytest.mark.parametrize(
    ("codec", "dtype"), [("fp32", torch.float32), ("int8", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_worker_and_its_server(tmp_path: Path, codec: str, dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(0)
    inputs = [torch.randn(8, 6, generator=dice).to(dtype) for _ in range(8)]
    opts = options(tmp_path, workers=1, save_every=2, codec=codec, fragments=2, sync_every=4)
    model = Net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with DiLoCoServer(opts, Address(port=0, tokens=TOKENS)) as server:
        token = Voice(server.address).token
        with (
            other_defaults(),
            DiLoCoWorker(model, optimizer, server.address, auth_token=token) as worker,
        ):
            for x in inputs:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        assert worker.sync_count >= 2
    assert all(
        p.dtype == dtype and bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad
    )
