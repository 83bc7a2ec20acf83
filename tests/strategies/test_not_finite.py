"""An average that is not finite discards the step in all groups alike, and says where."""

from __future__ import annotations

import pytest
import torch
from helpers.peers import Node, Script, World
from helpers.reference import OUTER, reference
from helpers.tiny import Tiny, backward, digest
from helpers.training import ROWS, STEPS, Training
from torch.testing import assert_close

from torchft.errors import NotFiniteError
from torchft.finite import are_finite, not_finite
from torchft.simulator.stacked import StackedLocal
from torchft.strategies import DiLoCoRecipe, Inner, ModelLocal, OptimSpec, Strategy
from torchft.strategies.recipe import Clock

AVERAGES = [name for name, row in ROWS.items() if row.kind.name not in ("islands", "demo", "top_k")]
LATER = [name for name in AVERAGES if ROWS[name].kind.name != "sparta"]


def train(name: str, poison: float, *, rounds: int = 2) -> tuple[World, dict[int, Training]]:
    """The last of two nodes sends `poison`, three times over, in round `rounds`."""
    world = World(Script(2))

    def story(node: Node) -> Training:
        one = Training(ROWS[name], node)
        contribute, sent_so_far = one.recipe.contribution, []

        def poisoned(fragment: object) -> object:
            sent, draft = contribute(fragment)  # type: ignore[arg-type]
            sent_so_far.append(1)
            if node.rank == 1 and len(sent_so_far) == rounds:
                sent[0][0, :3] = poison
            return sent, draft

        one.recipe.contribution = poisoned  # type: ignore[assignment,method-assign]
        return one.run()

    return world, world.run(story)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", LATER)
def test_all_discard_the_step_and_go_on(name: str, poison: float) -> None:
    world, results = train(name, poison)
    for node, weights in reference(ROWS[name].kind, Script(2, no={2}), STEPS).items():
        assert_close(results[node].weights, weights, rtol=0, atol=2e-6)
    assert len({digest(one.strategy.shared_state_dict()) for one in results.values()}) == 1
    assert world.reasons
    assert all(isinstance(reason, NotFiniteError) for reason in world.reasons)


def test_a_subset_that_is_not_finite_is_not_written() -> None:
    world, results = train("SPARTA", torch.nan)
    for one in results.values():
        assert all(bool(w.isfinite().all()) for w in one.weights)
    assert "3 of them in first.unused" not in str(world.reasons[0])
    assert "has 3 values that are NaN or infinite" in str(world.reasons[0])


@pytest.mark.parametrize("delay", [0, 3])
def test_a_node_whose_fragments_infect_each_other_goes_on_after_one_no(delay: int) -> None:
    """An old failing that must not come back: only the fragment of the round went back, got its
    NaN again from the others, and was tried again and again, so that no round ever committed."""
    world = World(Script(2))

    def story(node: Node) -> Strategy:
        model = Tiny()
        trained = [p for p in model.parameters() if p.requires_grad]
        local = ModelLocal([model.first, model.second], torch.optim.AdamW(trained, lr=0.01))
        recipe = DiLoCoRecipe(OUTER, 4, fragments=2, delay=delay, inner_state="restored")
        strategy = Strategy([recipe]).bind(local, node)
        for number in range(1, 25):
            if node.rank == 1 and number == 6:
                torch.nn.init.constant_(model.second[2].bias, torch.nan)
            local.zero_grads()
            backward(model, node.rank, number)
            strategy.step()
        strategy.finish()
        assert all(bool(p.isfinite().all()) for p in trained)
        assert min(recipe.versions) > 3
        return strategy

    results = world.run(story)
    assert world.reasons
    assert len({digest(one.shared_state_dict()) for one in results.values()}) == 1


def test_a_simulated_node_with_nan_goes_back_and_its_neighbour_goes_on() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    local = StackedLocal(model, 2, Inner(OptimSpec(torch.optim.SGD)), 10)
    recipe = DiLoCoRecipe(OUTER, 4, fragments=2)
    recipe.bind(local, Clock())
    first, second = recipe.fragments
    start = [flat[0].clone() for flat in local.weights(second)]
    local.set_weights(first, [torch.stack([w[0], w[1] * torch.nan]) for w in local.weights(first)])
    local.set_weights(second, [w + 1.0 for w in local.weights(second)])
    recipe.discard(first, None)
    for was, now in zip(start, local.weights(second), strict=True):
        assert_close(now, torch.stack([was + 1.0, was]))


@pytest.mark.parametrize("name", ["all-reduce", "LocalSGD", "DiLoCo", "DiLoCo in buckets"])
def test_the_first_parameter_and_the_number_of_values_are_named(name: str) -> None:
    world, _ = train(name, torch.nan)
    said = str(world.reasons[0])
    assert "has 3 values that are NaN or infinite, 3 of them in first.unused" in said


def test_finite_numbers_whose_sum_overflows_are_finite() -> None:
    large = torch.full((4,), 3e38)
    assert not large.sum().isfinite()
    assert are_finite([large, torch.full((9,), 6e4, dtype=torch.float16), torch.arange(3)])


def test_infinities_that_cancel_are_found() -> None:
    assert not are_finite([torch.tensor([1.0, torch.inf, -torch.inf])])


def test_all_are_counted_and_the_first_is_named() -> None:
    named = {
        "a": torch.ones(2),
        "b": torch.tensor([torch.nan, 1.0]),
        "c": torch.full((3,), -torch.inf),
    }
    said = str(not_finite(named))
    assert "4 values" in said
    assert "1 of them in b" in said
