"""A recipe that somebody writes and that is not quite right is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.small_runs import Fits

from torchft.errors import SettingsError
from torchft.peers import Place
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import run_stacked
from torchft.strategies import AllReduceRecipe, DiLoCoStrategy, Inner, OptimSpec, Recipe, Strategy
from torchft.strategies.model_local import ModelLocal
from torchft.strategies.recipe import By


class Mine(Recipe):
    """Right."""

    def contribution(self, fragment: Any) -> Any:
        return self.local.weights(fragment), None

    def apply_locally(self, fragment: Any, update: Any, draft: Any) -> None:
        self.local.set_weights(fragment, update)


def contributes(what: Callable[[Mine, Any], Any]) -> Mine:
    class Other(Mine):
        def contribution(self, fragment: Any) -> Any:
            return what(self, fragment)

    return Other()


def run(strategy: Strategy) -> None:
    run_stacked(
        Experiment(
            model=Fits(),
            train_dataset=torch.ones(40, 3),
            strategy=strategy,
            num_nodes=2,
            max_steps=2,
            batch_size=5,
            device="cpu",
        )
    )


def refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        run(Strategy([recipe], inner=Inner()))


def test_one_that_is_right_runs() -> None:
    run(Strategy([Mine()], inner=Inner()))


def test_the_old_name_of_its_period_works_once_more() -> None:
    def old(name: str, body: dict[str, Any]) -> Any:
        with pytest.warns(DeprecationWarning, match=f"torchft: {name}.every is now sync_every"):
            return type(name, (Mine,), body)

    assert old("OnTheClass", {"every": 3}).sync_every == 3
    recipe = Mine()
    with pytest.warns(DeprecationWarning, match=r"Mine.every is now sync_every"):
        recipe.every = 2
    with pytest.warns(DeprecationWarning, match=r"Mine.every is now sync_every"):
        assert recipe.every == recipe.sync_every == 2
    assert Mine.sync_every == 1


def test_its_rounds_open_every_so_many_steps() -> None:
    class Other(Mine):
        def __init__(self, sync_every: int) -> None:
            self.sync_every = sync_every
            self.rounds: list[int] = []

        def apply_locally(self, fragment: Any, update: Any, draft: Any) -> None:
            super().apply_locally(fragment, update, draft)
            self.rounds.append(self.clock.steps)

    for sync_every, rounds in (1, [1, 2]), (2, [2]), (3, []):
        recipe = Other(sync_every)
        run(Strategy([recipe], inner=Inner()))
        assert recipe.rounds == rounds


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"place": "after"}, r"Other.place='after': it must be one of Place.\w+, Place.\w+"),
        ({"by": "average"}, "Other.by='average': it must be one of By.AVERAGE"),
        ({"delay": 1.5}, "Other.delay=1.5: it must be an integer"),
        ({"sync_every": 2.5}, "Other.sync_every=2.5: it must be an integer"),
        ({"sync_every": 0}, "Other.sync_every=0: it must be an integer, at least 1"),
        ({"H": 10}, "Other has H=10, which decides nothing.*Other.sync_every steps"),
        ({"interval": 5}, "Other has interval=5, which decides nothing"),
        ({"contribution": Recipe.contribution}, "Other has no method contribution"),
        ({"apply_locally": Recipe.apply_locally}, "Other has no method apply_locally"),
        ({"by": By.ISLANDS}, "Other has no method islands: a recipe defines contribution and"),
    ],
)
def test_settings_and_methods_are_looked_at_before_the_first_step(
    settings: dict[str, Any], message: str
) -> None:
    refused(type("Other", (Mine,), settings)(), message)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda r, f: r.local.weights(f), r"contribution returned a list of 1 \(Tensor\)"),
        (lambda r, f: None, "Other.contribution returned None: contribution returns a pair"),
        (lambda r, f: (r.local.weights(f)[0], None), "sends one tensor of shape"),
        (lambda r, f: ([1.0], None), r"sends a list of 1 \(float\)"),
        (lambda r, f: ([torch.zeros(1, 4)], None), r"tensor 0 has the shape \(1, 4\), and 2 node"),
        (lambda r, f: ([torch.zeros(())], None), r"tensor 0 has the shape \(\)"),
    ],
)
def test_a_contribution_that_is_no_pair_with_rows_is_refused(what: Any, message: str) -> None:
    refused(contributes(what), message)


@pytest.mark.parametrize(
    "sent",
    [
        lambda rows: [torch.zeros(rows, 1)],
        lambda rows: [],
        lambda rows: [torch.zeros(rows, 4), torch.zeros(rows, 4)],
        lambda rows: [torch.zeros(rows, 4, 1)],
    ],
)
def test_what_does_not_fit_the_weights_is_not_written_into_them(sent: Any) -> None:
    message = r"set_weights was given tensors of shapes .* fragment has \[1 or 2, 4\]"
    refused(contributes(lambda r, f: (sent(r.local.rows), None)), message)


@pytest.mark.parametrize("write", ["set_weights", "set_grads"])
def test_what_does_not_fit_a_real_model_is_not_written_into_it(write: str) -> None:
    model = Fits()
    local = ModelLocal([model])
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(SettingsError, match=rf"{write} was given .*\(1, 1\).* has \[1, 4\]"):
        getattr(local, write)(local.whole, [torch.zeros(1, 1)])
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_elements_and_their_positions_are_as_many() -> None:
    local = ModelLocal([Fits()])
    with pytest.raises(SettingsError, match=r"put was given .*\(1, 1\).* has \[1, 2\]"):
        local.put(local.whole, [torch.tensor([0, 3])], [torch.zeros(1, 1)])


@pytest.mark.parametrize(
    "write",
    [
        lambda weights: weights.mul_(0.5),
        lambda weights: weights.data.add_(1),
        lambda weights: weights[1, 2:3].zero_(),
    ],
)
@pytest.mark.parametrize("place", Place)
def test_a_contribution_that_writes_into_the_weights_is_refused(write: Any, place: Place) -> None:
    def what(recipe: Mine, fragment: Any) -> Any:
        with torch.no_grad():
            write(recipe.local.weights(fragment)[0])
        return [torch.zeros(2, 1)], None

    recipe = contributes(what)
    type(recipe).place = place
    refused(recipe, "Other.contribution wrote into the weights: it only reads")


class TestStrategy:
    def test_no_recipes(self) -> None:
        with pytest.raises(SettingsError, match="the strategy has no recipe"):
            run(Strategy([], inner=Inner()))

    @pytest.mark.parametrize(
        ("recipes", "message"),
        [
            (Mine(), r"write Strategy\(\[Mine\(…\)\]\)"),
            (5, "a list of recipes, not a int"),
            ("all_reduce", "a list of recipes, not a str"),
            ([AllReduceRecipe], r"AllReduceRecipe is a class: give a recipe, AllReduceRecipe\(…\)"),
            (["all_reduce"], "'all_reduce' is a str: derive its class"),
        ],
    )
    def test_what_is_no_list_of_recipes(self, recipes: Any, message: str) -> None:
        with pytest.raises(SettingsError, match=message):
            Strategy(recipes)

    def test_an_optimizer_alone_is_an_inner(self) -> None:
        spec = OptimSpec(torch.optim.SGD, lr=0.1)
        assert Strategy([Mine()], inner=spec).inner == Inner(spec)

    def test_what_is_no_inner(self) -> None:
        with pytest.raises(SettingsError, match="Strategy's inner is AdamW: give Inner"):
            Strategy([Mine()], inner=torch.optim.AdamW)  # type: ignore[arg-type]

    def test_a_whole_strategy_needs_no_recipes_from_its_user(self) -> None:
        assert len(DiLoCoStrategy().recipes) == 1
