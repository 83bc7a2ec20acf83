"""Which elements: agreed without a word, each at most once, and as often as promised."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchft.errors import SettingsError
from torchft.seeds import seed63
from torchft.strategies import (
    Clock,
    FedAvgRecipe,
    IndexSelector,
    PartitionedIndexSelector,
    RandomIndexSelector,
    ShuffledSequentialIndexSelector,
)
from torchft.strategies.parts.agreed import permuted

SHARES = (RandomIndexSelector, ShuffledSequentialIndexSelector, PartitionedIndexSelector)
SELECTORS = [IndexSelector(), *(cls(0.3) for cls in SHARES), *(cls(1.0) for cls in SHARES)]

every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=repr)


@every_selector
@given(st.integers(0, 60), st.integers(0, 2**40), st.integers(-(2**63), 2**63))
def test_positions_lie_inside_and_come_once(
    selector: Any, numel: int, iteration: int, seed: int
) -> None:
    at = selector(numel, iteration, seed)
    assert at.dtype == torch.int64
    assert at.shape == (at.unique().numel(),)
    assert not at.numel() or 0 <= at.min() <= at.max() < numel


@every_selector
def test_two_nodes_agree_and_a_copy_that_travelled_too(selector: Any) -> None:
    here = [selector(1000, turn, 5) for turn in range(7)]
    there = pickle.loads(pickle.dumps(selector))
    torch.rand(3)  # what a node draws elsewhere has no part in it
    assert all(torch.equal(there(1000, turn, 5), mine) for turn, mine in enumerate(here))


@pytest.mark.parametrize("cls", SHARES)
def test_another_round_and_another_seed_mean_others(cls: Any) -> None:
    selector = cls(0.1)
    assert not torch.equal(selector(1000, 1, 0), selector(1000, 2, 0))
    assert not torch.equal(selector(1000, 1, 0), selector(1000, 1, 1))


@pytest.mark.parametrize("cls", SHARES)
@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, math.nan])
def test_what_is_no_share_is_refused(cls: Any, p: float) -> None:
    with pytest.raises(SettingsError, match=r"p=.*: it must be a .*number, above 0 and at most 1"):
        cls(p)


class TestAtRandom:
    """Bernoulli, by gaps."""

    p, numel, rounds = 0.03, 500, 2000

    def hits(self) -> torch.Tensor:
        selector = RandomIndexSelector(self.p)
        hits = torch.zeros(self.rounds, self.numel, dtype=torch.bool)
        for turn in range(self.rounds):
            hits[turn, selector(self.numel, turn, 3)] = True
        return hits

    def test_each_element_is_meant_with_probability_p(self) -> None:
        hits = self.hits()
        deviation = math.sqrt(self.p * (1 - self.p) / hits.numel())
        assert abs(float(hits.double().mean()) - self.p) < 5 * deviation
        often = hits.double().mean(0)
        assert float((often - self.p).abs().max()) < 5 * deviation * math.sqrt(self.numel)

    def test_the_count_varies_as_a_binomial(self) -> None:
        counts = self.hits().sum(1).double()
        variance = self.numel * self.p * (1 - self.p)
        assert 0.85 * variance < float(counts.var()) < 1.15 * variance

    def test_neighbours_are_independent(self) -> None:
        hits = self.hits()
        both = float((hits[:, 1:] & hits[:, :-1]).double().mean())
        deviation = math.sqrt(self.p**2 / hits.numel())
        assert abs(both - self.p**2) < 6 * deviation

    def test_it_costs_what_it_finds(self) -> None:
        """A trillion elements would not fit."""
        at = RandomIndexSelector(1e-9)(10**12, 0, 0)
        assert 800 < at.numel() < 1200
        assert at.max() < 10**12


@pytest.mark.parametrize("cls", [ShuffledSequentialIndexSelector, PartitionedIndexSelector])
class TestInTurn:
    """A walk means every element once."""

    @given(numel=st.integers(1, 90), p=st.floats(0.02, 1.0), first=st.integers(0, 5))
    def test_one_walk_covers_all_in_equal_parts(
        self, cls: Any, numel: int, p: float, first: int
    ) -> None:
        parts = min(math.ceil(1 / p - 1e-9), numel)
        walk = [cls(p)(numel, first * parts + turn, 1) for turn in range(parts)]
        assert torch.cat(walk).sort().values.equal(torch.arange(numel))
        assert max(map(len, walk)) - min(map(len, walk)) <= 1

    def test_the_second_walk(self, cls: Any) -> None:
        """The shuffled one repeats itself, the partition is drawn anew."""
        first, second = cls(0.1)(500, 3, 1), cls(0.1)(500, 13, 1)
        assert torch.equal(first, second) is (cls is ShuffledSequentialIndexSelector)


@given(st.integers(1, 300), st.integers(0, 1000))
def test_a_permutation_is_one(numel: int, seed: int) -> None:
    cut = numel // 3
    both = torch.cat([permuted(numel, 0, cut, seed), permuted(numel, cut, numel, seed)])
    assert both.sort().values.equal(torch.arange(numel))


def test_a_permutation_goes_everywhere_from_anywhere() -> None:
    """Each of 8 positions goes to each of 8 places about equally often."""
    seen = torch.zeros(8, 8)
    for seed in range(1000):
        seen[torch.arange(8), permuted(8, 0, 8, seed)] += 1
    chi = float(((seen - 125) ** 2 / 125).sum())
    assert chi < 49 + 6 * math.sqrt(2 * 49)


def test_close_numbers_are_far_when_mixed() -> None:
    mixes = {seed63(a, b) for a in range(50) for b in range(50)}
    assert len(mixes) == 2500
    assert all(0 <= m < 2**63 for m in mixes)


class TestIslands:
    """Who averages with whom."""

    def draw(self, size: int, participants: int, step: int, seed: int = 0) -> list[list[int]]:
        recipe = FedAvgRecipe(1, island_size=size, seed=seed)
        recipe.clock = Clock(step)
        return recipe.islands(participants)

    @given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 99))
    def test_everybody_is_on_one_island_of_the_size(
        self, size: int, participants: int, step: int
    ) -> None:
        islands = self.draw(size, participants, step)
        assert sorted(n for island in islands for n in island) == list(range(participants))
        assert all(len(island) == size for island in islands[:-1])
        assert 1 <= len(islands[-1]) <= size

    def test_they_are_drawn_anew_by_clock_and_seed(self) -> None:
        assert self.draw(2, 12, 1) == self.draw(2, 12, 1)
        assert self.draw(2, 12, 1) != self.draw(2, 12, 2)
        assert self.draw(2, 12, 1) != self.draw(2, 12, 1, seed=1)

    def test_all_pairs_meet_about_equally_often(self) -> None:
        together = torch.zeros(4, 4)
        for step in range(1500):
            for a, b in self.draw(2, 4, step):
                together[a, b] += 1
        pairs = together[together > 0]
        assert len(pairs) == 6
        assert float((pairs - 500).abs().max()) < 5 * math.sqrt(500)

    def test_no_node_on_an_island_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="island_size=0"):
            FedAvgRecipe(1, island_size=0)
