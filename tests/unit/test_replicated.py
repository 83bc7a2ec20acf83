"""`Replicated`: the strategy object of the simulator among groups, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from helpers.reference import OUTER, reference
from helpers.scripts import TinyScript
from helpers.tiny import Tiny, backward, digest
from helpers.training import ROWS, STEPS, Row
from torch import Tensor, nn
from torch.testing import assert_close

from torchft.ddp import PureDistributedDataParallel
from torchft.errors import ClosureError, MismatchError, PhaseError, SettingsError
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper
from torchft.replicated import Replicated
from torchft.strategies import (
    AllReduceRecipe,
    DeMoRecipe,
    DiLoCoRecipe,
    DiLoCoStrategy,
    FedAvgRecipe,
    Inner,
    LocalSGDRecipe,
    OptimSpec,
    Recipe,
    SimpleReduceStrategy,
    SpartaRecipe,
    Strategy,
    StreamingDiLoCoStrategy,
    TopKRecipe,
)

ADAMW = OptimSpec(torch.optim.AdamW, lr=1e-3)


class Group(TinyScript):
    """A replica group's script, as a user writes it."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.rank, seed=node.rank if node.script.opening else 0)
        self.node = node
        self.manager = InProcessManager(node)

    def replicated(self, strategy: Strategy, **options: Any) -> Replicated:
        return Replicated(self.manager, self.model, self.inner, strategy, **options)

    def run(self, replicated: Replicated, steps: int = STEPS) -> Group:
        self.entry = replicated
        replicated.join()
        while replicated.step_count < steps:
            replicated.zero_grad()
            backward(self.model, self.node.rank, replicated.step_count + 1)
            replicated.step()
        replicated.strategy.finish()
        return self


def alone() -> Group:
    return Group(Node(World(Script(1)), 0, 1))


class Halfway(Recipe):
    """A user's own recipe: every second step half of the way to the mean of the weights."""

    sync_every = 2

    def contribution(self, fragment: Any) -> Any:
        return self.local.weights(fragment), None

    def apply_locally(self, fragment: Any, update: Any, draft: Any) -> None:
        mine = self.local.weights(fragment)
        self.local.set_weights(
            fragment, [m.lerp(n, 0.5) for m, n in zip(mine, update, strict=True)]
        )


def third(numel: int, iteration: int, seed: int) -> Tensor:
    return torch.arange(iteration % 3, numel, 3)


STRATEGIES = {
    "all-reduce": lambda: Strategy([AllReduceRecipe()]),
    "FedAvg": lambda: Strategy([FedAvgRecipe(3)]),
    "LocalSGD": lambda: Strategy([LocalSGDRecipe(3)]),
    "DiLoCo": lambda: Strategy([DiLoCoRecipe(OUTER, 4)]),
    "Streaming DiLoCo": lambda: Strategy([DiLoCoRecipe(OUTER, 6, fragments=2, delay=4, mix=0.5)]),
    "SPARTA": lambda: Strategy([SpartaRecipe(third, 2)]),
    "SPARTA and DiLoCo": lambda: Strategy([SpartaRecipe(third, 2), DiLoCoRecipe(OUTER, 4)]),
    "top-k": lambda: Strategy([TopKRecipe(OUTER, 3, topk=4, chunk=16)]),
    "a recipe of one's own": lambda: Strategy([Halfway()]),
}
AMONG_GROUPS = {name: row for name, row in ROWS.items() if "islands" not in name}


@pytest.mark.parametrize("row", AMONG_GROUPS.values(), ids=AMONG_GROUPS.keys())
def test_a_group_is_lost_and_comes_back_and_the_numbers_are_the_references(row: Row) -> None:
    script = Script(3, lost={1: 2}, joins={1: 4})

    def train(node: Node) -> Group:
        group = Group(node)
        cuts = row.kind.fragments == 2 and not row.kind.cut
        modules = [group.model.first, group.model.second] if cuts else [group.model]
        made = row.make(LocalOf(group))
        recipes = made if isinstance(made, list) else [made]
        for recipe in recipes:
            recipe.codec = row.kind.codec
            recipe.check_inner = lambda optim: None  # the reference steps signs by AdamW too
        strategy = Strategy(recipes, bucket_bytes=row.bucket_bytes)
        samples = node.rank + 1
        entry = Replicated(
            group.manager, modules, group.inner, strategy, samples=samples, own_data=False
        )
        return group.run(entry)

    groups = World(script).run(train)
    expected = reference(row.kind, script, STEPS)
    for rank, weights in expected.items():
        assert_close(groups[rank].weights, weights, rtol=0, atol=2e-6)
    assert len({digest(g.entry.shared_state_dict()) for g in groups.values()}) == 1


class LocalOf:
    """What rows of the battery ask for the parameters of an outer optimizer."""

    def __init__(self, group: Group) -> None:
        self.parameters = group.trained


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "all-reduce"])
def test_groups_of_different_weights_start_equal(name: str) -> None:
    def train(node: Node) -> Group:
        group = Group(node)
        return group.run(group.replicated(STRATEGIES[name]()))

    groups = World(Script(3, opening=True)).run(train)
    assert len({digest(g.entry.shared_state_dict()) for g in groups.values()}) == 1


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_that_is_saved_and_loaded_goes_on_with_the_same_bits(name: str) -> None:
    def run(*, stops: bool) -> str:
        group = alone()
        entry = group.replicated(STRATEGIES[name]())
        group.run(entry, 12)
        if stops:
            saved = entry.state_dict()
            group = alone()
            with torch.no_grad():
                for parameter in group.trained:
                    parameter.zero_()
            entry = group.replicated(STRATEGIES[name]())
            entry.load_state_dict(saved)
        assert entry.step_count == 12
        group.run(entry, 24)
        return digest([group.weights, entry.state_dict()["strategy"]])

    assert run(stops=True) == run(stops=False)


def test_the_strategy_makes_the_optimizer_where_none_is_given() -> None:
    group = alone()
    made = DiLoCoStrategy(ADAMW, H=2, lr_scheduler="lambda_cosine", max_norm=1.0)
    entry = Replicated(group.manager, group.model, None, made)
    group.run(entry, 4)
    assert type(entry.optimizer.optimizer) is torch.optim.AdamW
    assert group.manager.current_step() == 2


def saved_by(strategy: Strategy) -> Any:
    group = alone()
    return group.run(Replicated(group.manager, group.model, None, strategy), 2).entry.state_dict()


def made_anew(strategy: Strategy) -> Replicated:
    group = alone()
    return Replicated(group.manager, group.model, None, strategy)


SGD = OptimSpec(torch.optim.SGD, lr=0.1)


class TestCheckpointsOfOthers:
    """A checkpoint is refused before anything is loaded of it."""

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (lambda: DiLoCoStrategy(ADAMW, H=3), r"sync_every: 2 → 3\. Make them equal"),
            (lambda: DiLoCoStrategy(SGD, H=2), "optimizer: AdamW → SGD"),
            (lambda: DiLoCoStrategy(ADAMW, SGD, H=2), r"outer.*lr: 0.7 → 0.1"),
            (lambda: DiLoCoStrategy(ADAMW, H=2, codec="int8"), "codec: None → "),
            (lambda: SimpleReduceStrategy(ADAMW), "strategy: DiLoCo → AllReduce"),
            (lambda: StreamingDiLoCoStrategy(ADAMW, H=2, fragments=2), "parts: 1 → 2"),
        ],
    )
    def test_of_other_options(self, other: Callable[[], Strategy], message: str) -> None:
        saved, entry = saved_by(DiLoCoStrategy(ADAMW, H=2)), made_anew(other())
        before = digest(list(entry._modules[0].state_dict().values()))
        with pytest.raises(SettingsError, match=message):
            entry.load_state_dict(saved)
        assert digest(list(entry._modules[0].state_dict().values())) == before

    def test_of_a_model_alone(self) -> None:
        entry = made_anew(DiLoCoStrategy(ADAMW, H=2))
        with pytest.raises(SettingsError, match=r"no state of Replicated.*load weights alone"):
            entry.load_state_dict(alone().model.state_dict())

    def test_what_has_no_record_of_options_loads_as_before(self) -> None:
        saved = saved_by(DiLoCoStrategy(ADAMW, H=2))
        del saved["options"]
        entry = made_anew(DiLoCoStrategy(ADAMW, H=2))
        entry.load_state_dict(saved)
        assert entry.step_count == 2

    def test_an_option_of_another_version_is_not_compared(self) -> None:
        saved = saved_by(DiLoCoStrategy(ADAMW, H=2))
        saved["options"]["recipes[0].of_a_later_version"] = 1
        made_anew(DiLoCoStrategy(ADAMW, H=2)).load_state_dict(saved)

    def test_the_backup_may_lie_elsewhere(self) -> None:
        def placed(pin: bool) -> Strategy:
            return Strategy([DiLoCoRecipe(OUTER, 2, pin_memory=pin)], inner=ADAMW)

        made_anew(placed(False)).load_state_dict(saved_by(placed(True)))


class TestRefusals:
    """Each names the way on, before anything is registered."""

    def refused(self, strategy: Any, message: str, optimizer: Any = "its own") -> None:
        group = alone()
        given = group.inner if isinstance(optimizer, str) else optimizer
        with pytest.raises(SettingsError, match=message):
            Replicated(group.manager, group.model, given, strategy)
        assert group.manager.keys == []

    def test_a_strategy_that_is_in_use(self) -> None:
        used = Strategy([LocalSGDRecipe(3)])
        alone().replicated(used)
        self.refused(used, "in use: make one for each run")

    def test_a_recipe_that_is_in_use(self) -> None:
        recipe = LocalSGDRecipe(3)
        alone().replicated(Strategy([recipe]))
        self.refused(Strategy([recipe]), "in use: make one per strategy")

    def test_an_optimizer_of_another_model(self) -> None:
        other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        self.refused(Strategy([LocalSGDRecipe(3)]), "make it of this model's parameters", other)

    def test_a_recipe_without_a_strategy(self) -> None:
        self.refused(LocalSGDRecipe(3), r"write Strategy\(\[LocalSGD")

    def test_a_class_in_the_place_of_a_strategy(self) -> None:
        self.refused(DiLoCoStrategy, r"give an object, DiLoCoStrategy\(")

    def test_what_is_no_strategy(self) -> None:
        self.refused("diloco", "is 'diloco': give one of torchft.strategies")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"manager": None}, r"manager is None: give a torchft.Manager"),
            ({"manager": Manager}, r"manager is the class Manager: give a torchft.Manager\("),
            ({"manager": nn.Linear(2, 2)}, r"manager is a Linear: .*Replicated\(manager, model"),
            ({"manager": torch.optim.SGD([torch.ones(1)])}, "manager is a SGD: give a torchft.Man"),
            ({"model": None}, "model is None: give a torch.nn.Module"),
            ({"model": "tiny"}, "model is 'tiny': give a torch.nn.Module"),
            ({"model": nn.Linear}, "model is the class Linear: give a torch.nn.Module"),
            ({"model": [nn.Linear(2, 2), 3]}, "model is a int: give"),
            ({"model": []}, "no parameter that requires a gradient: unfreeze"),
            ({"model": nn.ReLU()}, "no parameter that requires a gradient: unfreeze"),
            ({"model": Tiny().requires_grad_(False)}, "requires a gradient: unfreeze"),
            ({"samples": "3"}, "samples='3': it must be an integer, at least 1"),
            ({"samples": -1}, "samples=-1: it must be an integer, at least 1"),
            ({"max_steps": "x"}, "max_steps='x': it must be an integer, at least 1"),
        ],
    )
    def test_an_argument_of_another_kind(self, given: dict[str, Any], message: str) -> None:
        group, strategy = alone(), DiLoCoStrategy(ADAMW, H=2)
        right = {"manager": group.manager, "model": group.model, "optimizer": None}
        with pytest.raises(SettingsError, match=message):
            Replicated(**{**right, "strategy": strategy, **given})
        assert group.manager.keys == []
        group.run(Replicated(**right, strategy=strategy), 2)

    def test_a_strategy_in_the_place_of_the_optimizer(self) -> None:
        group = alone()
        with pytest.raises(SettingsError, match="a DiLoCoStrategy stands in the optimizer's place"):
            Replicated(group.manager, group.model, DiLoCoStrategy(ADAMW, H=2))

    def test_a_model_whose_gradients_are_averaged_already(self) -> None:
        group = alone()
        wrapped = PureDistributedDataParallel(group.manager, group.model)
        with pytest.raises(SettingsError, match="averages among the groups by itself: give the mo"):
            Replicated(group.manager, wrapped, None, DiLoCoStrategy(ADAMW, H=2))

    def test_a_manager_that_serves_another_leaves_the_strategy_unused(self) -> None:
        group, other = alone(), alone()
        group.replicated(Strategy([LocalSGDRecipe(3)]))
        strategy = Strategy([LocalSGDRecipe(3)])
        with pytest.raises(SettingsError, match=r"serves a Replicated already: .* as a list"):
            group.replicated(strategy)
        other.run(other.replicated(strategy), 3)

    def test_a_model_that_cannot_be_cut_so_leaves_the_strategy_unused(self) -> None:
        group = alone()
        recipes = [SpartaRecipe(third, 2), DiLoCoRecipe(OUTER, 99, fragments=99)]
        strategy = Strategy(recipes)
        with pytest.raises(SettingsError, match="99"):
            group.replicated(strategy)
        strategy.check_unused()

    def test_a_strategy_that_cannot_run_among_groups(self) -> None:
        self.refused(Strategy([FedAvgRecipe(3, island_size=2)]), "leave island_size out")

    def test_an_optimizer_of_another_kind_than_the_strategys(self) -> None:
        self.refused(DiLoCoStrategy(ADAMW, H=3), "give None in its place")

    def test_an_optimizer_of_another_rate_than_the_strategys(self) -> None:
        group = alone()
        optimizer = torch.optim.AdamW(group.trained, lr=0.5)
        with pytest.raises(SettingsError, match=r"lr=0.001.*lr=0.5"):
            Replicated(group.manager, group.model, optimizer, DiLoCoStrategy(ADAMW, H=3))

    def test_an_optimizer_that_would_leave_out_the_strategys_clipping(self) -> None:
        group = alone()
        optimizer = torch.optim.AdamW(group.trained, lr=1e-3)
        clipped = DiLoCoStrategy(ADAMW, H=3, max_norm=1.0)
        with pytest.raises(SettingsError, match="clips gradients or schedules"):
            Replicated(group.manager, group.model, optimizer, clipped)

    def test_an_optimizer_that_would_take_signs_for_gradients(self) -> None:
        group = alone()
        optimizer = torch.optim.AdamW(group.trained, lr=1e-3)
        with pytest.raises(SettingsError, match="DeMo keeps the momentum"):
            Replicated(group.manager, group.model, optimizer, Strategy([DeMoRecipe()]))

    def test_no_optimizer_at_all(self) -> None:
        self.refused(Strategy([LocalSGDRecipe(3)]), "neither an optimizer was given", None)

    def test_an_optimizer_that_votes_on_each_step(self) -> None:
        group = alone()
        votes = OptimizerWrapper(group.manager, group.inner)
        with pytest.raises(SettingsError, match="give the one that it wraps"):
            Replicated(group.manager, group.model, votes, Strategy([LocalSGDRecipe(3)]))

    def test_an_optimizer_that_computes_the_loss_in_its_step(self) -> None:
        group = alone()
        group.inner = torch.optim.LBFGS(group.trained)
        with pytest.raises(ClosureError, match="LBFGS computes the loss several times"):
            group.replicated(Strategy([LocalSGDRecipe(3)]))

    def test_a_schedule_of_a_run_of_unknown_length(self) -> None:
        cosine = {"lr_scheduler_kwargs": {"cosine_anneal": True}, "lr_scheduler": "lambda_cosine"}
        self.refused(DiLoCoStrategy(ADAMW, H=3, **cosine), "give Replicated.*max_steps", None)

    def test_a_step_that_did_not_begin(self) -> None:
        entry = alone().replicated(Strategy([LocalSGDRecipe(3)]))
        with pytest.raises(PhaseError, match="before each forward pass"):
            entry.step()

    @pytest.mark.parametrize("steps_before", [0, 2])
    def test_a_step_of_the_optimizer_in_place_of_its_own(self, steps_before: int) -> None:
        group = alone()
        entry = group.replicated(Strategy([LocalSGDRecipe(3)]))
        group.run(entry, steps_before)
        entry.zero_grad()
        backward(group.model, 0, 1)
        before = digest([p.detach() for p in group.trained])
        with pytest.raises(PhaseError, match=r"AdamW synchronises nothing: call zero_grad"):
            group.inner.step()
        assert digest([p.detach() for p in group.trained]) == before
        assert entry.step()

    def test_a_checkpoint_after_training_began(self) -> None:
        group = alone()
        entry = group.replicated(Strategy([LocalSGDRecipe(3)]))
        saved = entry.state_dict()
        group.run(entry, 1)
        with pytest.raises(PhaseError, match="before the first step"):
            entry.load_state_dict(saved)

    def test_a_parameter_that_thaws_in_the_middle_of_the_run(self) -> None:
        group = alone()
        entry = group.replicated(
            Strategy([LocalSGDRecipe(3)], inner=Inner(OptimSpec.of(group.inner)))
        )
        group.model.second.frozen.requires_grad_(True)
        with pytest.raises(MismatchError, match="frozen was frozen before"):
            group.run(entry, 1)
