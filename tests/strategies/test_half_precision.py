"""bf16 and fp16 parameters: shared state is fp32, and the weights are rounded once, from it.

An old failing that must not come back: the outer step was taken in the parameters' own dtype, so at
an outer rate of 0.3 twenty rounds moved nothing where fp32 reached .977.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.peers import Node, Script, World
from helpers.tiny import digest
from torch import Tensor, nn
from torch.testing import assert_close
from unit.test_local_sgd import alone

from torchft.errors import SettingsError
from torchft.local_sgd import DiLoCo as DiLoCoDoor
from torchft.local_sgd import LocalSGD as LocalSGDDoor
from torchft.simulator import Dies, Joins
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import run_stacked
from torchft.strategies import (
    DiLoCoRecipe,
    FedAvgRecipe,
    LocalSGDRecipe,
    LocalSGDStrategy,
    ModelLocal,
    OptimSpec,
    RandomIndexSelector,
    Recipe,
    SpartaRecipe,
    Strategy,
    StreamingDiLoCoStrategy,
    TopKRecipe,
    TopKStrategy,
)
from torchft.strategies.parts.outer import ModelOuter
from torchft.strategies.parts.precision import check_shared_dtype

ROUNDS = 20
NODES = 2
LAST_PLACE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-8}
"""Of numbers just below 1; of fp32 a step to compare with."""
SLOW = OptimSpec(torch.optim.SGD, lr=0.3)
NESTEROV = OptimSpec(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)

Make = Callable[[ModelLocal, Any], Recipe]


class Ones(nn.Module):
    """Two layers' worth of ones, for two fragments."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.ones(n, dtype=dtype)) for n in (5, 3))


def lent(outer: OptimSpec, every: int = 1, **options: Any) -> Make:
    """Over an optimizer that a script made of the model's own parameters."""

    def make(local: ModelLocal, shared: Any) -> Recipe:
        mixes = options.get("mix", 0) > 0
        mine = ModelOuter([outer.build(local.parameters)], keep_weights=mixes)
        return DiLoCoRecipe(mine, every, shared_dtype=shared, **options)

    return make


OUTER_STEPS: dict[str, Make] = {
    "DiLoCo": lambda _, shared: DiLoCoRecipe(SLOW, 1, shared_dtype=shared),
    "DiLoCo, the model's outer": lent(SLOW),
    "top-k": lambda _, shared: TopKRecipe(SLOW, 1, topk=9, chunk=9, shared_dtype=shared),
}


class Simulation:
    """One node: each step all its weights go down by one unit in the last place."""

    def __init__(self, node: Node, make: Make, dtype: torch.dtype, shared: Any) -> None:
        self.model, self.node = Ones(dtype), node
        local = ModelLocal([self.model])
        self.strategy = Strategy([make(local, shared)])
        self.strategy.bind(local, node)
        node.register(self._load, self._save)

    def _save(self) -> Any:
        return [self.strategy.shared_state_dict(), self.model.state_dict()]

    def _load(self, state: Any) -> None:
        self.strategy.load_shared_state_dict(state[0])
        self.model.load_state_dict(state[1])

    def run(self, steps: int = ROUNDS, places: Callable[[int], int] = lambda step: 1) -> Simulation:
        for step in range(steps):
            with torch.no_grad():
                for p in self.model.parameters():
                    p.sub_(places(step) * LAST_PLACE[p.dtype])
            self.strategy.after()
        self.strategy.finish()
        return self

    @property
    def recipe(self) -> Any:
        return self.strategy.recipes[0]

    @property
    def weights(self) -> Tensor:
        return torch.cat([p.detach() for p in self.model.parameters()])

    @property
    def backup(self) -> Tensor:
        backups = getattr(self.recipe, "backups", None) or [self.recipe.backup]
        return torch.cat([flat[0] for backup in backups for flat in backup.flats])


def train(
    make: Make, dtype: torch.dtype, shared: Any = torch.float32, script: Script | None = None
) -> dict[int, Simulation]:
    world = World(script or Script(NODES))
    return world.run(lambda node: Simulation(node, make, dtype, shared).run(ROUNDS - joined(node)))


def joined(node: Node) -> int:
    """Rounds that were over when it came."""
    return max(0, node.script.joins.get(node.rank, 1) - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OUTER_STEPS)
def test_outer_steps_below_the_last_place_add_up(name: str, dtype: torch.dtype) -> None:
    expected = 1 - ROUNDS * 0.3 * LAST_PLACE[dtype]
    for run in train(OUTER_STEPS[name], dtype).values():
        assert run.backup.dtype == torch.float32
        assert_close(run.backup, torch.full((8,), expected), rtol=0, atol=1e-6)
        assert torch.equal(run.weights, run.backup.to(dtype))
    for run in train(OUTER_STEPS[name], dtype, shared=None).values():
        assert run.weights.eq(1.0).all(), "without it nothing moves"


STRATEGIES: dict[str, Make] = {
    "momentum": lambda _, shared: DiLoCoRecipe(NESTEROV, 1, shared_dtype=shared),
    "momentum, the model's outer": lent(NESTEROV),
    "Streaming": lambda _, shared: DiLoCoRecipe(NESTEROV, 4, fragments=2, shared_dtype=shared),
    "Streaming, delayed": lent(NESTEROV, every=4, fragments=2, delay=3),
    "fed back": lambda _, shared: with_codec(
        DiLoCoRecipe(NESTEROV, 2, error_feedback=True, shared_dtype=shared)
    ),
}


def with_codec(recipe: Recipe) -> Recipe:
    from torchft.quantization import Int4

    recipe.codec = Int4(16)
    return recipe


@pytest.mark.parametrize("name", STRATEGIES)
def test_shared_state_is_what_an_fp32_model_has(name: str) -> None:
    """To the rounding of fp32: what the nodes move by is exact in bf16 here."""
    half, full = train(STRATEGIES[name], torch.bfloat16), train(STRATEGIES[name], torch.float32)
    moved = max(float((1 - run.backup).abs().max()) for run in full.values())
    assert moved > 2 * LAST_PLACE[torch.bfloat16]
    for node, run in half.items():
        assert_close(run.backup, full[node].backup, rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", [lent(SLOW, mix=0.5), lambda _, s: DiLoCoRecipe(SLOW, 1, mix=0.5)])
def test_a_mixture_is_rounded_once(make: Make) -> None:
    def story(node: Node) -> None:
        run = Simulation(node, make, torch.bfloat16, torch.float32)
        for _ in range(ROUNDS):
            with torch.no_grad():
                for p in run.model.parameters():
                    p.sub_(LAST_PLACE[p.dtype])
            mine = run.weights.float()
            run.strategy.after()
            assert torch.equal(run.weights, torch.lerp(run.backup, mine, 0.5).bfloat16())

    World(Script(1)).run(story)


AVERAGES: dict[str, Make] = {
    "LocalSGD": lambda _, shared: LocalSGDRecipe(1, shared_dtype=shared),
    "FedAvg": lambda _, shared: FedAvgRecipe(1, shared_dtype=shared),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_between_two_numbers_add_up(name: str) -> None:
    """One of three nodes moves, by a place a round: a third of a place is not lost."""

    def story(shared: Any) -> dict[int, Simulation]:
        return World(Script(3)).run(
            lambda node: Simulation(node, AVERAGES[name], torch.bfloat16, shared).run(
                places=lambda _: int(node.rank == 0)
            )
        )

    expected = 1 - ROUNDS / 3 * LAST_PLACE[torch.bfloat16]
    for run in story(torch.float32).values():
        assert_close(run.backup, torch.full((8,), expected), rtol=0, atol=1e-6)
        assert torch.equal(run.weights, run.backup.bfloat16())
    assert all(run.weights.eq(1.0).all() for run in story(None).values())


def test_a_mean_of_equal_weights_is_that_weight() -> None:
    """An old failing: sums in bf16 made 1 of twelve times 1.0078."""

    def story(shared: Any) -> bool:
        def train(node: Node) -> bool:
            run = Simulation(node, lambda _, s: sparta(s), torch.bfloat16, shared)
            with torch.no_grad():
                for p in run.model.parameters():
                    p.add_(2.0**-7 * torch.arange(1, p.numel() + 1))
            before = run.weights
            run.run(1, places=lambda _: 0)
            return torch.equal(run.weights, before)

        return all(World(Script(11)).run(train).values())

    def sparta(shared: Any) -> Recipe:
        return SpartaRecipe(RandomIndexSelector(1.0), shared_dtype=shared)

    assert story(torch.float32)
    assert not story(None)


def test_beside_sparta_too() -> None:
    def story(node: Node) -> Simulation:
        run = Simulation(
            node, lambda _, s: DiLoCoRecipe(SLOW, 1, shared_dtype=s), torch.bfloat16, None
        )
        run.model = Ones(torch.bfloat16)
        local = ModelLocal([run.model])
        recipes = [SpartaRecipe(RandomIndexSelector(0.5)), DiLoCoRecipe(SLOW, 1)]
        run.strategy = Strategy(recipes)
        run.strategy.bind(local, node)
        return run.run()

    for run in World(Script(NODES)).run(story).values():
        backup = run.strategy.recipes[1].backups[0].flats[0]  # type: ignore[attr-defined]
        expected = 1 - ROUNDS * 0.3 * LAST_PLACE[torch.bfloat16]
        assert_close(backup, torch.full((1, 8), expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*OUTER_STEPS, "momentum, the model's outer"])
def test_whoever_joins_heals_the_fp32_state(name: str) -> None:
    make = {**OUTER_STEPS, **STRATEGIES}[name]
    runs = train(make, torch.bfloat16, script=Script(3, joins={2: 9}))
    assert len({digest(run.strategy.shared_state_dict()) for run in runs.values()}) == 1
    assert not torch.equal(runs[2].backup, runs[2].backup.bfloat16().float())


@pytest.mark.parametrize("name", [*OUTER_STEPS, *AVERAGES, "momentum, the model's outer"])
def test_a_checkpoint_has_the_fp32_state(name: str) -> None:
    make = {**OUTER_STEPS, **AVERAGES, **STRATEGIES}[name]

    def story(node: Node) -> tuple[str, str]:
        first = Simulation(node, make, torch.bfloat16, torch.float32).run(7)
        saved = copy.deepcopy([first.strategy.state_dict(), first.model.state_dict()])
        second = Simulation(node, make, torch.bfloat16, torch.float32)
        second.strategy.load_state_dict(saved[0])
        second.model.load_state_dict(saved[1])
        again = second.run(6)
        through = Simulation(node, make, torch.bfloat16, torch.float32)
        return digest(again.strategy.state_dict()), digest(through.run(13).strategy.state_dict())

    resumed, straight = World(Script(1)).run(story)[0]
    assert resumed == straight


def test_a_checkpoint_of_before_goes_on_from_its_weights() -> None:
    """Of versions whose backup and momentum were in the parameters' dtype."""

    def story(node: Node) -> None:
        old = Simulation(node, lent(NESTEROV), torch.bfloat16, None).run(10)
        new = Simulation(node, lent(NESTEROV), torch.bfloat16, torch.float32)
        new.strategy.load_state_dict(copy.deepcopy(old.strategy.state_dict()))
        assert torch.equal(new.backup, old.backup.float())
        (momentum,) = {
            state["momentum_buffer"].dtype
            for optimizer in new.recipe.outer._optimizers
            for state in optimizer.state.values()
        }
        assert momentum == torch.float32
        new.model.load_state_dict(old.model.state_dict())
        new.run(1)

    World(Script(1)).run(story)


class Pulled(nn.Module):
    """In bf16; it takes fp32 batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5).bfloat16()

    def forward(self, batch: Tensor) -> Tensor:
        return (self.layer(batch.bfloat16()) ** 2).mean().float()


@pytest.mark.parametrize(
    "make",
    [
        lambda: StreamingDiLoCoStrategy("adamw", H=4, fragments=2, delay=1, mix=0.5),
        lambda: TopKStrategy("adamw", H=3, topk=4, chunk=16),
        lambda: LocalSGDStrategy("adamw", H=3),
    ],
)
def test_a_simulated_run_resumes_after_a_death_with_the_same_bits(make: Any) -> None:
    def experiment() -> Experiment:
        torch.manual_seed(0)
        return Experiment(
            model=Pulled(),
            train_dataset=torch.randn(90, 7),
            strategy=make(),
            num_nodes=3,
            max_steps=16,
            batch_size=4,
            device="cpu",
            digests=True,
            events=[Dies(2, 3), Joins(2, 7)],
        )

    saved: dict[str, Any] = {}

    def save(run: Any) -> None:
        if run.step in (9, 10) and not run.strategy.in_flight and not saved:
            saved.update(copy.deepcopy(run.state_dict()))

    straight = run_stacked(experiment(), on_step=save)
    resumed = run_stacked(experiment(), resume=saved)
    assert straight.digests[-1] == resumed.digests[-1]
    assert len(straight.heals) == 1


def test_an_fp32_model_pays_nothing_and_keeps_its_bits() -> None:
    for make in [*OUTER_STEPS.values(), *AVERAGES.values(), lent(NESTEROV)]:
        runs = [train(make, torch.float32, shared) for shared in (torch.float32, None)]
        digests = {digest(run.strategy.state_dict()) for of in runs for run in of.values()}
        assert len(digests) == 1
        outer = getattr(runs[0][0].recipe, "outer", None)
        assert not getattr(outer, "_masters", None)


class TestTheDoors:
    """`torchft.local_sgd`, whose scripts make the outer optimizer themselves."""

    @staticmethod
    def half() -> Any:
        group = alone()
        group.model.bfloat16()
        return group

    def test_an_optimizer_that_has_state_already_keeps_it(self) -> None:
        group = self.half()
        outer = NESTEROV.build(group.trained)
        for p in group.trained:
            outer.state[p]["momentum_buffer"] = torch.full_like(p, 0.25)
        DiLoCoDoor(group.manager, [group.model], group.inner, outer, 4)
        masters = outer.param_groups[0]["params"]
        assert [p.shape for p in masters] == [p.shape for p in group.trained]
        assert all(outer.state[p]["momentum_buffer"].eq(0.25).all() for p in masters)
        assert {outer.state[p]["momentum_buffer"].dtype for p in masters} == {torch.float32}

    def test_a_step_that_raises_leaves_the_backup_whole(self) -> None:
        def story(node: Node) -> None:
            run = Simulation(node, lent(NESTEROV), torch.bfloat16, torch.float32).run(3)
            before = run.backup.clone()

            def broken(*_: object) -> None:
                raise RuntimeError("broken")

            run.recipe.outer._optimizers[0].register_step_post_hook(broken)
            with pytest.raises(RuntimeError, match="broken"):
                run.run(1)
            assert torch.equal(run.backup, before)
            assert torch.equal(run.weights, before.bfloat16())

        World(Script(1)).run(story)

    def test_groups_compare_it_where_it_matters(self) -> None:
        group = self.half()
        LocalSGDDoor(group.manager, group.model, group.inner, 3)
        assert group.manager.described["shared dtype"] == ["float32"]
        for other, options in (self.half(), {"shared_dtype": None}), (alone(), {}):
            LocalSGDDoor(other.manager, other.model, other.inner, 3, **options)
            assert "shared dtype" not in other.manager.described


@pytest.mark.parametrize("given", [torch.int32, "float33", "Tensor", 32])
def test_what_is_no_dtype_is_refused(given: Any) -> None:
    with pytest.raises(SettingsError, match=r"use torch\.float32, or None"):
        DiLoCoRecipe(SLOW, 1, shared_dtype=given)


def test_a_dtype_by_its_name() -> None:
    assert check_shared_dtype("float32") == torch.float32
