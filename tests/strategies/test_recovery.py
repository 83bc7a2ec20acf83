"""One NaN at one node costs a round, and no run: what would bring it back begins anew there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.peers import Node, Script, World
from helpers.reference import OUTER
from helpers.tiny import Tiny, backward, digest
from torch import Tensor, nn

from torchft.errors import NotFiniteError
from torchft.simulator.events import Membership
from torchft.simulator.peers import StackedPeers
from torchft.simulator.stacked import StackedLocal
from torchft.strategies import (
    DiLoCoRecipe,
    Inner,
    LocalSGDRecipe,
    ModelLocal,
    OptimSpec,
    Recipe,
    Strategy,
)
from torchft.strategies.demo import DeMoRecipe
from torchft.strategies.parts.broken import reset_inner
from torchft.strategies.top_k import TopKRecipe

STEPS, BAD = 24, 6

RECIPES: dict[str, Callable[[], Recipe]] = {
    "DiLoCo": lambda: DiLoCoRecipe(OUTER, 4),
    "DiLoCo, restored": lambda: DiLoCoRecipe(OUTER, 4, inner_state="restored"),
    "Streaming": lambda: DiLoCoRecipe(OUTER, 4, fragments=2),
    "Streaming, delay": lambda: DiLoCoRecipe(OUTER, 4, fragments=2, delay=3, mix=0.5),
    "LocalSGD": lambda: LocalSGDRecipe(4),
    "top-k": lambda: TopKRecipe(OUTER, 4),
    "DeMo": DeMoRecipe,
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(
    node: Node, recipe: Recipe, optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
) -> tuple[Strategy, Tiny, torch.optim.Optimizer, int]:
    """Node 1's gradients are NaN in step `BAD`. The last value: rounds that were committed."""
    model = Tiny()
    inner = optimizer(model)
    strategy = Strategy([recipe]).bind(ModelLocal([model], inner), node)
    apply_locally, committed = recipe.apply_locally, []

    def counted(*args: Any) -> None:
        committed.append(1)
        apply_locally(*args)

    recipe.apply_locally = counted  # type: ignore[method-assign]
    for number in range(1, STEPS + 1):
        strategy.local.zero_grads()
        strategy.begin()
        backward(model, node.rank, number)
        if node.rank == 1 and number == BAD:
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.full_like(p, torch.nan)
        strategy.step()
    strategy.finish()
    return strategy, model, inner, len(committed)


def steps_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {int(state["step"]) for state in optimizer.state.values() if state}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_after_one_nan(name: str) -> None:
    world = World(Script(2))
    results = world.run(lambda node: train(node, RECIPES[name]()))
    assert world.reasons and all(isinstance(why, NotFiniteError) for why in world.reasons)
    for strategy, model, optimizer, committed in results.values():
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert committed >= strategy.clock.steps // 4 - 3
        for state in optimizer.state.values():
            assert all(bool(v.isfinite().all()) for v in state.values() if isinstance(v, Tensor))
    shared = [one.shared_state_dict() for one, *_ in results.values()]
    assert len({digest(state) for state in shared}) == 1


@pytest.mark.parametrize("name", ["DiLoCo", "LocalSGD"])
def test_only_where_the_nan_came_from_the_moments_begin_anew(name: str) -> None:
    results = World(Script(2)).run(lambda node: train(node, RECIPES[name]()))
    assert steps_of(results[0][2]) == {STEPS}
    assert steps_of(results[1][2]) == {STEPS - 8}, "after the round that came to nothing"


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adagrad,  # its state is made before the first step
        torch.optim.NAdam,
        torch.optim.RMSprop,
        torch.optim.Adafactor,
        lambda of, lr: torch.optim.SGD(of, lr=lr, momentum=0.9),
    ],
    ids=["Adagrad", "NAdam", "RMSprop", "Adafactor", "SGD"],
)
def test_any_inner_optimizer_trains_on(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    def made(model: nn.Module) -> torch.optim.Optimizer:
        return optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)

    world = World(Script(2))
    results = world.run(lambda node: train(node, DiLoCoRecipe(OUTER, 4), made))
    assert world.reasons
    for strategy, model, *_ in results.values():
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert strategy.recipes[0].versions == [5]  # type: ignore[attr-defined]


def test_a_node_without_anything_to_go_back_to_ends_and_says_why() -> None:
    with pytest.raises(NotFiniteError, match="weights of this group are NaN"):
        World(Script(2)).run(lambda node: train(node, LocalSGDRecipe(4, backup=False)))


class WithStatistics(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))


def with_a_nan_buffer(node: Node, buffers: str) -> tuple[WithStatistics, DiLoCoRecipe]:
    model, recipe = WithStatistics(), DiLoCoRecipe(OUTER, 4, buffers=buffers)
    strategy = Strategy([recipe]).bind(ModelLocal([model], adamw(model)), node)
    for number in range(1, STEPS + 1):
        strategy.local.zero_grads()
        backward(model, node.rank, number)
        model.mean.lerp_(torch.full((2,), float(number)), 0.5)
        if node.rank == 1 and number == BAD:
            model.mean.fill_(torch.nan)
        strategy.step()
    return model, recipe


@pytest.mark.parametrize("buffers", ["averaged", "copied"])
def test_a_nan_in_a_buffer_costs_a_round_and_goes_back(buffers: str) -> None:
    results = World(Script(2)).run(lambda node: with_a_nan_buffer(node, buffers))
    for model, recipe in results.values():
        assert recipe.versions == ([5] if buffers == "averaged" else [6])
        assert bool(model.mean.isfinite().all())
        assert torch.equal(model.mean, results[0][0].mean)
        assert model.mask.tolist() == [0.0, -math.inf], "an infinity may be meant"


def test_a_nan_in_a_buffer_of_ones_own_is_named_once() -> None:
    def story(node: Node) -> None:
        model = WithStatistics()
        strategy = Strategy([DiLoCoRecipe(OUTER, 4)]).bind(ModelLocal([model], adamw(model)), node)
        for number in range(1, STEPS + 1):
            strategy.local.zero_grads()
            backward(model, node.rank, number)
            if node.rank == 1 and number in (BAD, BAD + 8):
                model.mean.fill_(torch.nan)
                nn.init.constant_(model.first[0].weight, torch.nan)
            strategy.step()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        World(Script(2)).run(story)
    about = [str(one.message) for one in said if "buffer mean is NaN" in str(one.message)]
    assert len(about) == 1


@pytest.mark.parametrize("fragments", [1, 2])
def test_a_simulated_node_with_nan_in_its_moments_begins_them_anew(fragments: int) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    local = StackedLocal(model, 3, Inner(OptimSpec(torch.optim.AdamW)), STEPS)
    recipe = DiLoCoRecipe(OUTER, 4, fragments=fragments)
    strategy = Strategy([recipe])
    strategy.bind(local, StackedPeers(local, Membership(3), strategy))
    for number in range(1, STEPS + 1):
        local.zero_grads()
        for row, one in enumerate(local.models):
            poison = torch.nan if row == 1 and number == BAD else 1.0
            (one(torch.ones(2, 3) * number).mean() * poison).backward()
        strategy.step()
    assert all(bool(flat.isfinite().all()) for flat in local.weights(local.whole))
    assert sum(recipe.versions) >= STEPS * fragments // 4 - fragments
    counts = {row: set[int]() for row in range(3)}
    for (row, _), state in local.inner_states(local.whole).items():
        counts[row].add(int(state["step"]))
    assert counts[0] == counts[2] == {STEPS}
    assert max(counts[1]) < STEPS


def test_parameters_whose_state_is_finite_keep_it() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[model[0].weight]["exp_avg"][0, 0] = torch.nan
    local = ModelLocal([model], optimizer)
    reset_inner(local, [0])
    begun = {name: int(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    assert begun == {"0.weight": 0, "0.bias": 1, "1.weight": 1, "1.bias": 1}
    assert not optimizer.state[model[0].weight]["exp_avg"].any()
