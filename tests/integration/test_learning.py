"""What is learnt is what the algorithms give: against plain torch, on pictures of digits.

A multilayer perceptron 784-256-128-10, batches of 64 for each node, AdamW at 1e-3, a round every 20
steps. On 2 and 4 nodes, after 300 steps, DiLoCo comes to a validation loss of about .434 and .395,
FedAvg to .532 and .477, and seeds differ by some .02.
"""

from __future__ import annotations

import copy
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.digits import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchft.experiments import Trainer
from torchft.simulator import Feed
from torchft.strategies import DiLoCoStrategy, FedAvgStrategy, OptimSpec

pytest.importorskip("sklearn", reason="scikit-learn (the extra `examples`) has the pictures")

BATCH, H, LR = 64, 20, 1e-3
SEEDS = (1, 2, 3)
OUTER: dict[str, dict[str, Any]] = {
    "diloco": {"lr": 0.7, "momentum": 0.9, "nesterov": True},
    "fedavg": {"lr": 1.0},  # the mean itself
}
EXPECTED = {
    ("diloco", 2): 0.434,
    ("diloco", 4): 0.395,
    ("fedavg", 2): 0.532,
    ("fedavg", 4): 0.477,
}


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])


@cache
def pictures(train: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, held_x, held_y = digits(train, 4096)
    return x, y, held_x[:2048], held_y[:2048]


def perceptron(seed: int) -> Perceptron:
    torch.manual_seed(seed)
    return Perceptron()


def in_plain_torch(name: str, nodes: int, steps: int, seed: int, train: int) -> nn.Module:
    """The reference, on the same batches: each node alone for H steps, then the mean of all, or
    the outer step towards it."""
    x, y, *_ = pictures(train)
    feed = Feed((x, y), num_nodes=nodes, batch_size=BATCH, seed=seed)
    whole = perceptron(seed)
    models = [copy.deepcopy(whole) for _ in range(nodes)]
    inner = [torch.optim.AdamW(model.parameters(), lr=LR) for model in models]
    outer = torch.optim.SGD(whole.parameters(), **OUTER[name])
    for step in range(steps):
        for node, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            optimizer.zero_grad()
            model(feed.batch(node, step)).backward()
            optimizer.step()
        if (step + 1) % H:
            continue
        for master, *own in zip(*(m.parameters() for m in [whole, *models]), strict=True):
            master.grad = master.detach() - torch.stack([p.detach() for p in own]).mean(0)
        outer.step()
        for model in models:
            model.load_state_dict(whole.state_dict())
    return whole


def in_the_simulator(
    name: str, nodes: int, steps: int, seed: int, train: int, folder: Path
) -> nn.Module:
    x, y, *_ = pictures(train)
    optim = OptimSpec(torch.optim.AdamW, lr=LR)
    strategy = DiLoCoStrategy(optim, H=H) if name == "diloco" else FedAvgStrategy(optim, H=H)
    return Trainer(perceptron(seed), (x, y), device="cpu").fit(
        strategy=strategy,
        num_nodes=nodes,
        max_steps=steps,
        batch_size=BATCH,
        seed=seed,
        disable_logging=True,
        log_dir=folder,
    )


@torch.no_grad()
def loss(model: nn.Module, train: int) -> float:
    *_, x, y = pictures(train)
    return float(model.eval()([x, y]))


def assert_learns_alike(name: str, nodes: int, steps: int, train: int, folder: Path) -> float:
    """Each seed's loss is that of the reference, far closer than seeds are. Returns their mean."""
    ours = [
        loss(in_the_simulator(name, nodes, steps, seed, train, folder), train) for seed in SEEDS
    ]
    plain = [loss(in_plain_torch(name, nodes, steps, seed, train), train) for seed in SEEDS]
    mean, spread = statistics.mean(ours), statistics.stdev(ours)
    print(
        f"\n{name}, {nodes} nodes, {steps} steps, seeds {SEEDS}: "
        f"{', '.join(f'{value:.4f}' for value in ours)} (mean {mean:.3f}, spread {spread:.3f}); "
        f"plain torch {', '.join(f'{value:.4f}' for value in plain)}"
    )
    assert ours == pytest.approx(plain, abs=0.005)
    return mean


def test_diloco_and_fedavg_learn_as_in_plain_torch(tmp_path: Path) -> None:
    diloco = assert_learns_alike("diloco", 2, 60, 7_680, tmp_path)
    fedavg = assert_learns_alike("fedavg", 2, 60, 7_680, tmp_path)
    # Without its outer optimizer DiLoCo would be FedAvg.
    assert diloco < fedavg - 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nodes"), EXPECTED)
def test_300_steps_come_to_the_known_loss(name: str, nodes: int, tmp_path: Path) -> None:
    mean = assert_learns_alike(name, nodes, 300, 60_000, tmp_path)
    assert mean == pytest.approx(EXPECTED[name, nodes], abs=0.04)
