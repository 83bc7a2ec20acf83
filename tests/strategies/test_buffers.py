"""A model's buffers where its weights are synchronised: left, averaged, or copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from helpers.reference import OUTER
from torch import Tensor, nn

from torchft import local_sgd
from torchft.errors import NotFiniteError, SettingsError
from torchft.quantization import Int4
from torchft.simulator.stacked import StackedLocal
from torchft.strategies import (
    DiLoCoRecipe,
    DiLoCoStrategy,
    Inner,
    LocalSGDRecipe,
    LocalSGDStrategy,
    ModelLocal,
    Recipe,
    Strategy,
    StreamingDiLoCoStrategy,
)

RECIPES: dict[str, Callable[[str], Recipe]] = {
    "LocalSGD": lambda buffers: LocalSGDRecipe(1, buffers=buffers),
    "DiLoCo": lambda buffers: DiLoCoRecipe(OUTER, 1, buffers=buffers),
    "DiLoCo, 2 fragments": lambda buffers: DiLoCoRecipe(OUTER, 2, fragments=2, buffers=buffers),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())


class Counts(nn.Module):
    """A weight and a bias, a mean, a count, flags, one that is tied, and one of no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        nn.init.constant_(self.linear.weight, 0.5)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("short", torch.zeros(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("same", self.mean)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def pretend(self, node: int, step: int = 0) -> None:
        """What a forward pass of `node` would leave."""
        self.mean.copy_(torch.tensor([1.0, 2.0, 4.0]) * (node + 1) + step)
        self.short.fill_(node + 1)
        self.count.fill_(10 + node)
        self.flags.copy_(torch.tensor([node > 0, node > 1]))
        self.scratch = torch.full((1,), float(node))  # a module may put another in its place

    def values(self) -> dict[str, Any]:
        names = ("mean", "short", "count", "flags", "scratch")
        return {name: getattr(self, name).tolist() for name in names}


def of(mean: list[float], short: float, count: int, flags: list[bool], scratch: int) -> Any:
    return {
        "mean": mean,
        "short": [short, short],
        "count": count,
        "flags": flags,
        "scratch": [float(scratch)],
    }


OWN = [of([n + 1.0, 2 * n + 2.0, 4 * n + 4.0], n + 1, 10 + n, [n > 0, n > 1], n) for n in range(3)]


def trained(node: Node, recipe: Recipe, rounds: int = 1) -> Counts:
    model = Counts()
    node.register(model.load_state_dict, model.state_dict)
    strategy = Strategy([recipe]).bind(ModelLocal([model]), node)
    node.register(strategy.load_shared_state_dict, strategy.shared_state_dict)
    if node.joins:
        strategy.join()
    while strategy.clock.steps < rounds:
        model.pretend(node.rank)
        strategy.after()
    strategy.finish()
    return model


def run(script: Script, make: Callable[[], Recipe], rounds: int = 1) -> list[Any]:
    models = World(script).run(lambda node: trained(node, make(), rounds))
    return [models[node].values() for node in sorted(models)]


@every_recipe
class TestEachChoice:
    def test_left(self, recipe: Callable[[str], Recipe]) -> None:
        assert run(Script(3), lambda: recipe("left")) == OWN

    def test_averaged(self, recipe: Callable[[str], Recipe]) -> None:
        expected = [of([2.0, 4.0, 8.0], 2.0, 11, [True, False], n) for n in range(3)]
        assert run(Script(3), lambda: recipe("averaged")) == expected

    def test_an_integer_mean_is_the_nearest_halves_up(
        self, recipe: Callable[[str], Recipe]
    ) -> None:
        expected = [of([1.5, 3.0, 6.0], 1.5, 11, [True, False], n) for n in range(2)]
        assert run(Script(2), lambda: recipe("averaged")) == expected

    def test_copied(self, recipe: Callable[[str], Recipe]) -> None:
        expected = [{**OWN[0], "scratch": [float(n)]} for n in range(3)]
        assert run(Script(3), lambda: recipe("copied")) == expected

    @pytest.mark.parametrize("how", ["averaged", "copied"])
    def test_a_no_leaves_them(self, recipe: Callable[[str], Recipe], how: str) -> None:
        assert run(Script(3, no={1}), lambda: recipe(how)) == OWN

    @pytest.mark.parametrize("how", ["averaged", "copied"])
    def test_a_lost_member_leaves_them(self, recipe: Callable[[str], Recipe], how: str) -> None:
        assert run(Script(3, lost={2: 1}), lambda: recipe(how)) == OWN[:2]

    def test_who_joins_gets_them_and_does_not_count(self, recipe: Callable[[str], Recipe]) -> None:
        copied = run(Script(3, joins={0: 2}), lambda: recipe("copied"), rounds=2)
        assert [one["mean"] for one in copied] == [OWN[1]["mean"]] * 3
        averaged = run(Script(3, joins={0: 2}), lambda: recipe("averaged"), rounds=2)
        assert [one["count"] for one in averaged] == [12] * 3  # of 11 and 12


def test_those_of_the_opening_are_what_a_delayed_round_writes() -> None:
    def story(node: Node) -> list[float]:
        model, recipe = Counts(), DiLoCoRecipe(OUTER, 2, delay=1, buffers="averaged")
        strategy = Strategy([recipe]).bind(ModelLocal([model]), node)
        for step in range(2):
            model.pretend(node.rank, step)
            strategy.after()
        return model.mean.tolist()

    assert World(Script(2)).run(story) == {0: [1.5, 3.0, 6.0], 1: [1.5, 3.0, 6.0]}


def test_a_codec_does_not_touch_them() -> None:
    def rounded() -> Recipe:
        recipe = LocalSGDRecipe(1, buffers="averaged")
        recipe.codec = Int4()
        return recipe

    assert run(Script(3), rounded)[0]["mean"] == [2.0, 4.0, 8.0]


@pytest.mark.parametrize("how", ["averaged", "copied"])
def test_a_nan_is_a_no_for_all_and_says_which_buffer(how: str) -> None:
    def story(node: Node) -> list[Tensor]:
        model = Counts()
        strategy = Strategy([LocalSGDRecipe(1, buffers=how)]).bind(ModelLocal([model]), node)
        model.pretend(node.rank)
        if node.rank == 0:
            model.mean[1] = torch.nan
        with torch.no_grad():
            model.linear.weight.fill_(node.rank)
        strategy.after()
        return [model.mean, model.linear.weight.detach()]

    world = World(Script(2))
    left = world.run(story)
    assert left[1][0].tolist() == OWN[1]["mean"]
    assert left[0][1].tolist() == left[1][1].tolist() == [[0.5, 0.5]]
    assert world.reasons
    for reason in world.reasons:
        assert isinstance(reason, NotFiniteError)
        assert "buffer mean would be NaN" in str(reason)


def test_several_modules_have_theirs_once() -> None:
    shared = nn.BatchNorm1d(2)
    local = ModelLocal([nn.Sequential(nn.Linear(2, 2), shared), nn.Sequential(shared, nn.ReLU())])
    (named,) = local.buffers()
    assert list(named) == ["0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"]
    assert named["0.1.running_mean"] is shared.running_mean


@pytest.mark.parametrize("how", ["left", "averaged", "copied"])
@pytest.mark.parametrize("door", ["LocalSGD", "DiLoCo"])
def test_the_doors_offer_it_and_groups_compare_it(door: str, how: str) -> None:
    described: dict[int, dict[str, list[str]]] = {}

    def story(node: Node) -> Any:
        model, manager = Counts(), InProcessManager(node)
        described[node.rank] = manager.described
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        if door == "LocalSGD":
            made: Any = local_sgd.LocalSGD(manager, model, inner, 1, buffers=how)  # type: ignore[arg-type]
        else:
            outer = OUTER(list(model.parameters()))
            made = local_sgd.DiLoCo(manager, [model], inner, outer, 1, buffers=how)  # type: ignore[arg-type]
        with made:
            model.linear(torch.ones(2)).backward()
            model.pretend(node.rank)
            inner.step()
        return model.values()["count"]

    expected = {"left": [10, 11, 12], "averaged": [11] * 3, "copied": [10] * 3}[how]
    assert World(Script(3)).run(story) == dict(enumerate(expected))
    assert described[0].get("buffers") == (None if how == "left" else [how])
    names = ["mean", "short", "count", "flags", "mask"]
    assert described[0].get("model buffers") == (None if how == "left" else names)


class TestRefusals:
    @pytest.mark.parametrize(
        "make",
        [
            *RECIPES.values(),
            lambda how: LocalSGDStrategy(buffers=how),
            lambda how: DiLoCoStrategy(buffers=how),
            lambda how: StreamingDiLoCoStrategy(buffers=how),
        ],
    )
    def test_another_word(self, make: Callable[[str], object]) -> None:
        with pytest.raises(
            SettingsError, match=r"buffers='mean': it must be one of left, averaged, copied"
        ):
            make("mean")

    def test_a_complex_one_has_no_nearest_mean_and_can_be_copied(self) -> None:
        model = nn.Linear(2, 2)
        model.register_buffer("turns", torch.zeros(2, dtype=torch.complex64))
        node = Node(World(Script(1)), 0, 1)
        for local in (ModelLocal([model]), StackedLocal(model, 2, Inner(), 1)):
            with pytest.raises(SettingsError, match=r"buffer turns is torch.complex64.*'copied'"):
                Strategy([LocalSGDRecipe(1, buffers="averaged")]).bind(local, node)
            Strategy([LocalSGDRecipe(1, buffers="copied")]).bind(local, node)
