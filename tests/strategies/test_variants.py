"""Where a paper and its authors' code differ: what each reading computes, and who may choose it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.peers import Node, Script, World
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.testing import assert_close
from unit.test_local_sgd import alone

from torchft.compat.exogym.strategy import FedAvgStrategy as GymsFedAvg
from torchft.errors import SettingsError
from torchft.local_sgd import LocalSGD as LocalSGDDoor
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import run_stacked
from torchft.strategies import (
    DeMoRecipe,
    DeMoStrategy,
    FedAvgStrategy,
    LocalSGDRecipe,
    ModelLocal,
    OptimSpec,
    Recipe,
    Strategy,
    TopKRecipe,
    TopKStrategy,
)
from torchft.strategies.parts.chunks import chunks_of
from torchft.strategies.parts.largest import mean_of

PLAIN = OptimSpec(SGD, lr=1.0)


class TestTheMeanOfSparseNumbers:
    """Two nodes send (4, ·) and (2, 6) of two places."""

    @pytest.mark.parametrize(
        ("mean_over", "expected"), [("members", [3.0, 3.0]), ("senders", [3.0, 6.0])]
    )
    def test_over_members_or_senders(self, mean_over: str, expected: list[float]) -> None:
        like = [torch.zeros(2, 1, 3)]
        where = torch.tensor([[0, 2], [0, 1]], dtype=torch.int16)
        values = torch.tensor([[4.0, 0.0], [2.0, 6.0]])
        (mean,) = mean_of([where, values], like, 2, mean_over)
        assert mean[0, :2].tolist() == expected

    @pytest.mark.parametrize("mean_over", ["members", "senders"])
    def test_a_number_that_one_of_two_sends(self, mean_over: str) -> None:
        """Node 0 moves its first weight by 1, node 1 its second; k = 1 of 2."""

        def story(node: Node) -> Tensor:
            model = nn.Linear(2, 1, bias=False)
            nn.init.zeros_(model.weight)
            recipe = TopKRecipe(PLAIN, 1, topk=1, chunk=2, mean_over=mean_over)
            strategy = Strategy([recipe]).bind(ModelLocal([model]), node)
            with torch.no_grad():
                model.weight[0, node.rank] = 1.0
            strategy.after()
            return model.weight.detach()[0]

        for weights in World(Script(2)).run(story).values():
            assert weights.tolist() == ([0.5, 0.5] if mean_over == "members" else [1.0, 1.0])


def test_chunks_of_the_model_and_of_each_tensor() -> None:
    model = nn.Linear(4, 6)  # 6 x 4 and 6
    local = ModelLocal([model])
    flats = local.weights(local.whole)
    sizes = {
        way: [tuple(c.shape) for c in chunks_of(way, 9, local, local.whole, flats).zeros(1)]
        for way in ("model", "tensor")
    }
    assert sizes == {"model": [(1, 4, 9)], "tensor": [(1, 4, 6), (1, 2, 3)]}


@pytest.mark.parametrize("way", ["model", "tensor"])
def test_what_is_cut_is_put_together_again(way: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 11))
    local = ModelLocal([model])
    flats = local.weights(local.whole)
    chunks = chunks_of(way, 16, local, local.whole, flats)
    held = chunks.zeros(1)
    chunks.add(held, flats)
    chunks.add(held, flats)
    twice = chunks.join([one[0] for one in held], flats)
    assert_close(twice, [2 * flat for flat in flats], rtol=0, atol=0)


class TestDeMosInnerOptimizer:
    """An old failing: AdamW took signs for gradients, where the authors' code ignores it."""

    @pytest.mark.parametrize(
        "optim",
        [
            OptimSpec(AdamW, lr=1e-3),
            OptimSpec(Adam),
            OptimSpec(SGD, lr=0.1, momentum=0.9),
            OptimSpec(SGD, lr=0.1, maximize=True),
        ],
    )
    def test_any_but_plain_sgd_is_refused(self, optim: OptimSpec) -> None:
        for make in (
            lambda: DeMoStrategy(optim_spec=optim),
            lambda: Strategy([DeMoRecipe()], inner=optim),
            lambda: DeMoStrategy(inner_optim=optim, weight_decay=0.1),
        ):
            with pytest.raises(SettingsError, match=r"would work on signs: use OptimSpec.*SGD"):
                make()

    def test_plain_sgd_is_not(self) -> None:
        DeMoStrategy(optim_spec=OptimSpec(SGD, lr=0.1, weight_decay=0.1, momentum=0.0))
        DeMoStrategy(optim_spec="sgd", weight_decay=0.1)


class Two(nn.Module):
    """Its loss pulls its weight to the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Tensor) -> Tensor:
        return 0.5 * ((batch - self.weight) ** 2).mean()


def shard(rank: int, num_nodes: int, is_training: bool) -> Tensor:
    """Node 0 has 1 sample at 0.6, node 1 has 3 at 0.8."""
    return torch.full((1, 1), 0.6) if rank == 0 else torch.full((3, 1), 0.8)


class TestFedAvgWeighs:
    """By samples, as the paper does, where nodes bring data of their own."""

    @staticmethod
    def learned(strategy: Strategy, data: Any = shard, nodes: int = 2) -> float:
        experiment = Experiment(
            model=Two(),
            train_dataset=data,
            strategy=strategy,
            num_nodes=nodes,
            max_steps=1,
            batch_size=1,
            device="cpu",
        )
        model = run_stacked(experiment).model
        assert isinstance(model, Two)
        return model.weight.item()

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, 0.75),
            ({"weighting": "samples"}, 0.75),
            ({"weighting": "equal"}, 0.7),
            ({"codec": "fp32"}, 0.7),
            ({"island_size": 2}, 0.75),
        ],
    )
    def test_by_the_samples_of_unequal_shards(
        self, options: dict[str, Any], expected: float
    ) -> None:
        strategy = FedAvgStrategy(PLAIN, H=1, **options)
        assert self.learned(strategy) == pytest.approx(expected, abs=1e-6)

    def test_as_exo_gym_does_under_its_name(self) -> None:
        assert self.learned(GymsFedAvg(PLAIN, H=1)) == pytest.approx(0.7, abs=1e-6)
        with pytest.warns(UserWarning, match="has no async_sparta_delay=0"):
            assert GymsFedAvg(PLAIN, H=7, async_sparta_delay=0).recipes[0].sync_every == 7  # type: ignore[attr-defined]

    def test_a_data_set_that_is_dealt_out_costs_no_further_number(self) -> None:
        strategy = FedAvgStrategy(PLAIN, H=1)
        self.learned(strategy, torch.ones(8, 1))
        assert strategy.recipes[0].weighting == "equal"  # type: ignore[attr-defined]

    def test_groups_say_how_many_they_have(self) -> None:
        group = alone()
        LocalSGDDoor(group.manager, group.model, group.inner, 3, samples=1200)
        assert group.manager.described["weighting"] == ["samples"]
        with pytest.raises(SettingsError, match=r"samples=1\.5: it must be an integer"):
            LocalSGDDoor(group.manager, group.model, group.inner, 3, samples=1.5)  # type: ignore[arg-type]

    def test_without_anybody_who_knows_it_is_refused(self) -> None:
        def story(node: Node, samples: list[int] | None, says: str) -> None:
            local = ModelLocal([Two()])
            local.samples = samples
            strategy = Strategy([LocalSGDRecipe(1, weighting="samples")]).bind(local, node)
            with pytest.raises(SettingsError, match=says):
                strategy.after()

        World(Script(1)).run(lambda node: story(node, None, "needs to know how many samples"))
        World(Script(1)).run(lambda node: story(node, [0], "each needs 1 or more"))

    def test_a_codec_that_would_change_the_number_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="the codec int8 would change that"):
            self.learned(FedAvgStrategy(PLAIN, H=1, weighting="samples", codec="int8"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: TopKStrategy(mean_over="all"),
            "mean_over='all': it must be one of members, senders",
        ),
        (
            lambda: DeMoStrategy(mean_over="all"),
            "mean_over='all': it must be one of members, senders",
        ),
        (lambda: TopKStrategy(chunks_of="row"), "chunks_of='row': it must be one of model, tensor"),
        (lambda: TopKStrategy(chunks_of="tensor", chunk=200), "no square.*such as 196"),
        (
            lambda: FedAvgStrategy(weighting="size"),
            "weighting='size': it must be one of None, equal, samples",
        ),
    ],
)
def test_what_is_no_reading_is_refused(make: Any, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        make()


@pytest.mark.parametrize(
    ("recipe", "other"),
    [
        (lambda: TopKRecipe(PLAIN, 1), lambda: TopKRecipe(PLAIN, 1, mean_over="members")),
        (lambda: TopKRecipe(PLAIN, 1), lambda: TopKRecipe(PLAIN, 1, chunks_of="tensor")),
        (lambda: DeMoRecipe(), lambda: DeMoRecipe(mean_over="members")),
        (lambda: LocalSGDRecipe(1), lambda: LocalSGDRecipe(1, weighting="samples")),
    ],
)
def test_groups_compare_their_readings(recipe: Any, other: Any) -> None:
    def compared(made: Recipe) -> dict[str, str]:
        node = Node(World(Script(1)), 0, 1)
        Strategy([made]).bind(ModelLocal([Two()]), node)
        return node.compared

    assert compared(recipe()) != compared(other())


def test_a_checkpoint_that_is_cut_otherwise_is_refused() -> None:
    def bound(**options: Any) -> Strategy:
        node = Node(World(Script(1)), 0, 1)
        recipe = TopKRecipe(PLAIN, 1, chunk=4, **options)
        return Strategy([recipe]).bind(ModelLocal([nn.Linear(4, 6)]), node)

    saved = bound().state_dict()
    bound().load_state_dict(saved)
    with pytest.raises(SettingsError, match="residual of TopKRecipe is cut otherwise than here"):
        bound(chunks_of="tensor").load_state_dict(saved)
