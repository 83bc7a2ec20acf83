"""Names of an earlier release, given to what has others now."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from torchft.errors import SettingsError
from torchft.experiments.config import SimulateConfig, StrategyConfig, from_mapping
from torchft.experiments.registry import strategy_of
from torchft.manager import Manager
from torchft.renamed import old_names_of, renamed_arguments
from torchft.strategies import DiLoCoRecipe, OptimSpec, Recipe, StreamingDiLoCoStrategy, TopKRecipe


@renamed_arguments(old="new")
def doubled(new: int, *, more: int = 0) -> int:
    return 2 * new + more


class Called:
    @renamed_arguments(old="new")
    def __init__(self, new: int) -> None:
        self.new = new


def test_an_old_name_works_with_a_warning_that_says_the_new_one_where_it_was_called() -> None:
    with pytest.warns(DeprecationWarning, match=r"test_renamed.doubled: old is now new") as seen:
        assert doubled(old=2, more=1) == 5
    assert seen[0].filename == __file__


def test_the_new_name_and_no_name_work_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    assert doubled(2) == doubled(new=2) == 4
    assert not recwarn.list


def test_both_names_are_refused() -> None:
    with pytest.raises(TypeError, match="old is now new, and both are given"):
        doubled(old=2, new=2)


def test_the_signature_has_the_new_names_alone() -> None:
    assert list(inspect.signature(doubled).parameters) == ["new", "more"]
    assert old_names_of(doubled) == old_names_of(Called) == {"old": "new"}
    assert old_names_of(OptimSpec) == {}


def test_a_manager_takes_unsaid_but_not_with_its_name_of_now() -> None:
    assert old_names_of(Manager.allreduce) == {"unsaid": "error_feedback"}
    lost = torch.zeros(2)
    with pytest.raises(TypeError, match="unsaid is now error_feedback, and both are given"):
        Manager.allreduce(object(), lost, unsaid=lost, error_feedback=lost)  # type: ignore[arg-type, call-arg]


def test_a_manager_takes_a_step_by_the_old_name() -> None:
    with pytest.warns(DeprecationWarning, match=r"Manager.take_step is steps.take now"):
        taken = Manager.take_step(SimpleNamespace(steps=SimpleNamespace(take=lambda: "it")))  # type: ignore[arg-type]
    assert taken == "it"


def test_a_recipe_of_ones_own_may_still_say_adopt() -> None:
    with pytest.warns(DeprecationWarning, match=r"Mine: adopt is now apply_locally"):

        class Mine(Recipe):
            def adopt(self, fragment: object, news: object, draft: object) -> None:
                self.got = news

    mine = Mine()
    mine.apply_locally(None, "an average", None)  # type: ignore[arg-type]
    assert mine.got == "an average"


OUTER = OptimSpec.from_string("sgd", lr=0.5)


def test_recipes_take_every_and_outer() -> None:
    for cls in (DiLoCoRecipe, TopKRecipe):
        with pytest.warns(DeprecationWarning) as seen:
            recipe = cls(outer=OUTER, every=7)
        said = {str(one.message) for one in seen}
        where = f"{cls.__module__}.{cls.__name__}"
        assert said == {
            f"{where}: outer is now outer_optimizer",
            f"{where}: every is now sync_every",
        }
        assert recipe.sync_every == 7


def test_streaming_takes_the_delay_and_the_mixture_by_the_names_of_the_front() -> None:
    with pytest.warns(DeprecationWarning, match=r"fragment_sync_delay is now delay"):
        strategy = StreamingDiLoCoStrategy(H=8, fragment_sync_delay=2)
    assert strategy.settings["delay"] == strategy.recipes[0].delay == 2


def test_a_sweep_takes_every_as_an_argument_and_as_a_setting() -> None:
    with pytest.warns(DeprecationWarning, match="every is now sync_every"):
        assert SimulateConfig(every=(5,)) == SimulateConfig(sync_every=(5,))
    with pytest.warns(FutureWarning, match="every is now sync_every"):
        assert from_mapping({"every": 5}).sync_every == (5,)


def test_options_of_a_strategy_in_a_sweep() -> None:
    options = {"outer": {"lr": 0.25}, "fragment_sync_delay": 2}
    asked = StrategyConfig(name="streaming", options=options)
    with pytest.warns(FutureWarning) as seen:
        made = strategy_of(SimulateConfig(), asked, sync_every=8, lr=0.1)
    assert {str(one.message) for one in seen} == {
        "torchft simulate: streaming: outer is now outer_optimizer",
        "torchft simulate: strategy streaming: fragment_sync_delay is now delay",
    }
    assert made.settings["delay"] == 2
    assert made.settings["outer_optimizer"].kwargs == {"lr": 0.25}


def test_an_option_of_a_strategy_under_both_names_is_refused_in_words() -> None:
    asked = StrategyConfig(name="streaming", options={"fragment_sync_delay": 2, "delay": 2})
    with pytest.raises(SettingsError, match="fragment_sync_delay is now delay, and both are given"):
        strategy_of(SimulateConfig(), asked, sync_every=8, lr=0.1)
