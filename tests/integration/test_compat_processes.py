"""Strategies that call collectives themselves, on real processes, against a computation by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.small_runs import pairs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset

from torchft import compat
from torchft.compat import (
    AveragingCommunicator,
    CommunicateOptimizeStrategy,
    CommunicationModule,
    DiLoCoCommunicator,
    DiLoCoStrategy,
    OptimSpec,
    SparseCommunicator,
    Strategy,
    Trainer,
    all_gather,
    all_reduce,
    broadcast,
)
from torchft.compat.exogym.strategy import processes
from torchft.compat.exogym.strategy.sparta import RandomIndexSelector
from torchft.experiments import local_nodes
from torchft.experiments.local_nodes import NodeFailed
from torchft.simulator import NodeError, Result
from torchft.simulator.feed import Feed

NODES, STEPS, BATCH, SEED = 2, 4, 5, 42
LR = 0.1
SGD = OptimSpec(torch.optim.SGD, lr=LR)


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a script, which has no threads yet."""
    monkeypatch.setattr(local_nodes, "_can_fork", lambda: True)


class Line(nn.Module):
    """21 + 3 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return cross_entropy(self.layer(x), y)


def line() -> Line:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Line()


def run(strategy: Any, *, nodes: int = NODES, val: Any = False, **settings: Any) -> Result:
    trainer = Trainer(line(), pairs(), {True: pairs(20), False: None}.get(val, val), device="cpu")
    made: dict[str, Any] = {"max_steps": STEPS, "batch_size": BATCH, "disable_logging": True}
    trainer.fit(strategy=strategy, num_nodes=nodes, seed=SEED, **{**made, **settings})
    assert trainer.result is not None
    return trainer.result


def by_hand(
    average: Callable[[int, list[Line]], None],
    *,
    nodes: int = NODES,
    gradients: Callable[[list[Line]], None] = lambda models: None,
) -> list[Line]:
    """The same training in one loop: `average` is called with step and models after each step."""
    models = [line() for _ in range(nodes)]
    feed = Feed(pairs(), num_nodes=nodes, batch_size=BATCH, seed=SEED)
    for step in range(STEPS):
        for node, model in enumerate(models):
            model.zero_grad()
            model(feed.batch(node, step)).backward()
        gradients(models)
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= LR * parameter.grad
            average(step, models)
    return models


def assert_equal(result: Result, models: list[Line]) -> None:
    for found, expected in zip(result.models, models, strict=True):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-6, atol=1e-7)


class Rounded(Strategy):
    """Gradients travel as whole numbers."""

    def __init__(self, optim_spec: OptimSpec, scale: float, **kwargs: Any) -> None:
        super().__init__(scale=scale, **kwargs)
        self.optim_spec = optim_spec

    def step(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                wide = torch.round(parameter.grad / self.scale).to(torch.int32)
                all_reduce(wide)
                parameter.grad = wide.float() * self.scale / self.num_nodes
        self.optim.step()
        super().step()

    scale: float


def test_gradients_that_a_strategy_rounds_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    def rounded(models: list[Line]) -> None:
        for group in zip(*(model.parameters() for model in models), strict=True):
            total = sum(torch.round(p.grad / 0.01) for p in group if p.grad is not None)
            for parameter in group:
                parameter.grad = total * 0.01 / NODES

    strategy = Rounded(SGD, 0.01)
    result = run(
        strategy, val=True, disable_logging=False, log_dir=tmp_path, run_name="own", val_interval=3
    )
    assert_equal(result, by_hand(lambda step, models: None, gradients=rounded))
    # Two tensors of 24 numbers together, of 4 bytes; a ring of two sends each once.
    assert result.bytes_sent == [STEPS * 24 * 4] * NODES
    assert [(r.step, r.collectives) for r in result.rounds] == [(s, 2) for s in range(STEPS)]
    assert [look["step"] for look in result.validations] == [0, 3, STEPS]
    assert result.validations[-1]["global_loss"] < result.validations[0]["global_loss"]
    assert len((tmp_path / "own" / "train.csv").read_text().splitlines()) == 1 + STEPS
    assert "Rounded" in (tmp_path / "own" / "config.json").read_text()


def of_its_own(rank: int, num_nodes: int, train_dataset: bool) -> Dataset[Any]:
    """Held-out samples that differ from node to node."""
    return Subset(pairs(20), range(rank * 5, rank * 5 + 10))


def test_the_communicator_of_diloco_is_the_strategy_of_that_name() -> None:
    made = CommunicateOptimizeStrategy([DiLoCoCommunicator(H=2)], SGD, max_norm=0.5)
    real = run(made, val=of_its_own, val_interval=3)
    rows = run(DiLoCoStrategy(SGD, H=2, max_norm=0.5), val=of_its_own, val_interval=3)
    for mine, theirs in zip(real.validations, rows.validations, strict=True):
        assert mine["local_losses"] == pytest.approx(theirs["local_losses"], rel=1e-5)
        assert mine["global_loss"] == pytest.approx(theirs["global_loss"], rel=1e-5)
    assert real.bytes_sent == rows.bytes_sent
    assert [record.step for record in real.rounds] == [1, 3]
    for one, other in zip(real.models, rows.models, strict=True):
        for name, value in other.state_dict().items():
            torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-6, atol=1e-7)


NAMED: dict[str, Any] = {
    "SimpleReduceStrategy": {"max_norm": 0.5},
    "FedAvgStrategy": {"H": 2},
    "DiLoCoStrategy": {"H": 2, "max_norm": 0.5},
    "SPARTAStrategy": {"p_sparta": 1.0, "sparta_interval": 2},
    "SPARTADiLoCoStrategy": {"p_sparta": 1.0, "sparta_interval": 3, "H": 2},
}


EACH = "SPARTADiLoCoStrategy"
"""Has the parts of the others."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) for name in NAMED if name != EACH] + [EACH],
)
def test_a_subclass_of_a_name_steps_as_the_recipe_of_that_name(name: str) -> None:
    options = {"inner_optim_spec": SGD, **NAMED[name]}
    own = type("Own", (getattr(processes, name),), {"step": getattr(processes, name).step})
    made, recipe = own(**options), getattr(compat, name)(**options)
    by_processes, by_rows = run(made), run(recipe)
    for one, other in zip(by_processes.models, by_rows.models, strict=True):
        for key, value in other.state_dict().items():
            torch.testing.assert_close(one.state_dict()[key], value, rtol=1e-5, atol=1e-6)


class Gossip(CommunicationModule):
    """Every second step each node takes half of the weights of the one before it."""

    def _init_node(self, model: nn.Module, rank: int, num_nodes: int) -> None:
        self.seen: list[int] = []

    def communicate(self, model: nn.Module, rank: int, num_nodes: int, local_step: int) -> None:
        self.seen.append(local_step)
        if local_step % 2:
            return
        for parameter in model.parameters():
            everyones = [torch.empty_like(parameter.data) for _ in range(num_nodes)]
            all_gather(everyones, parameter.data)
            parameter.data.add_(everyones[rank - 1]).div_(2)


def test_a_module_of_ones_own_gathers_the_weights_of_all() -> None:
    def gossip(step: int, models: list[Line]) -> None:
        if step % 2 == 0:
            before = [[p.clone() for p in model.parameters()] for model in models]
            for node, model in enumerate(models):
                for index, parameter in enumerate(model.parameters()):
                    parameter.copy_((before[node][index] + before[node - 1][index]) / 2)

    result = run(CommunicateOptimizeStrategy([Gossip()], inner_optim=SGD), nodes=3)
    assert_equal(result, by_hand(gossip, nodes=3))
    assert result.bytes_sent == [2 * 2 * 24 * 4] * 3  # two steps, to two others


class FromTheFirst(Strategy):
    """All take the weights of node 0, by torch's own call; what is drawn is alike at all nodes."""

    drawn: float

    def _init_node(self, model: nn.Module, rank: int, num_nodes: int) -> None:
        super()._init_node(model, rank, num_nodes)
        self.optim = torch.optim.SGD(model.parameters(), lr=LR)

    def step(self) -> None:
        self.optim.step()
        drawn = torch.rand(3)
        agreed = drawn.clone()
        broadcast(agreed)
        assert torch.equal(drawn, agreed)
        for parameter in self.model.parameters():
            dist.broadcast(parameter.data, src=0)
        super().step()


def test_calls_of_torchs_own_count_too_and_draws_are_alike() -> None:
    def copied(step: int, models: list[Line]) -> None:
        for model in models[1:]:
            model.load_state_dict(models[0].state_dict())

    result = run(FromTheFirst(), nodes=3)
    assert_equal(result, by_hand(copied, nodes=3))
    assert result.bytes_sent == [STEPS * (3 + 24) * 4 * 2, 0, 0]


@pytest.mark.filterwarnings("ignore:.*opened no round:UserWarning")
def test_sparse_and_islands_in_one_strategy_conserve_the_mean() -> None:
    modules = [SparseCommunicator(RandomIndexSelector(0.4)), AveragingCommunicator(island_size=2)]
    result = run(CommunicateOptimizeStrategy(modules, "sgd"), nodes=3, max_steps=1)
    alone = run(CommunicateOptimizeStrategy([], "sgd"), nodes=3, max_steps=1)
    assert result.model is not None and alone.model is not None
    for one, other in zip(result.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    weights = [model.state_dict()["layer.weight"] for model in result.models]
    assert sum(torch.equal(a, b) for a, b in [weights[:2], weights[1:], weights[::2]]) == 1


class Broken(Strategy):
    """Node 1 fails in a step of its own."""

    def __init__(self, how: str) -> None:
        super().__init__(optim_spec=SGD, how=how)

    how: str

    def step(self) -> None:
        if self.rank == 1 and self.local_step == 1:
            if self.how == "raises":
                raise ValueError("no such island")
            self.optim.param_groups[0]["lr"] = float("inf")
        self.optim.step()
        super().step()


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("raises", NodeFailed, r"node 1 failed:(.|\n)*no such island"),
        ("infinite", NodeError, "node 1"),
    ],
)
def test_a_node_that_fails_ends_the_run_by_its_name(how: str, kind: Any, says: str) -> None:
    with pytest.raises(kind, match=says):
        run(Broken(how))


class Headless(Strategy):
    def step(self) -> None:
        super().step()


def test_a_strategy_without_an_optimizer_is_told_how_to_have_one() -> None:
    with pytest.raises(ValueError, match=r"Headless has no optimizer: set self.optim_spec"):
        run(Headless())
