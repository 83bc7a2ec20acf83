"""How a model is cut: whole blocks, about equal bytes, the same everywhere."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from helpers.tiny import Tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchft.errors import SettingsError
from torchft.simulator.stacked import StackedLocal
from torchft.strategies import DiLoCoRecipe, Inner, ModelLocal, OptimSpec, StreamingDiLoCoStrategy
from torchft.strategies.fragments import cut

PATTERNS = ("sequential", "strided")
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)

layers = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@st.composite
def models(draw: st.DrawFn) -> tuple[list[str], list[int]]:
    """Blocks of some parameters each, with an embedding before and a head behind; their bytes."""
    sizes = {"embedding.weight": draw(st.integers(0, 99))}
    for block, inside in enumerate(draw(st.lists(layers, max_size=12))):
        sizes |= {f"blocks.{block}.layers.{at}.weight": size for at, size in enumerate(inside)}
    sizes |= {"head.weight": draw(st.integers(0, 99)), "head.bias": draw(st.integers(0, 9))}
    return list(sizes), list(sizes.values())


def block_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


any_model = given(models(), st.sampled_from(PATTERNS), st.data())


class TestAnyModel:
    @any_model
    def test_every_parameter_is_in_one_fragment_and_none_is_empty(
        self, model: tuple[list[str], list[int]], pattern: str, data: st.DataObject
    ) -> None:
        names, nbytes = model
        parts = data.draw(st.integers(1, len(names)))
        fragments = cut(names, nbytes, parts, pattern)
        assert [one.index for one in fragments] == list(range(parts))
        held = [position for one in fragments for position in one.parameters]
        assert sorted(held) == list(range(len(names)))
        for one in fragments:
            assert one.parameters and list(one.parameters) == sorted(one.parameters)
        if pattern == "sequential":
            assert held == sorted(held)

    @any_model
    def test_blocks_stay_whole_and_no_share_is_further_from_equal_than_the_largest_block(
        self, model: tuple[list[str], list[int]], pattern: str, data: st.DataObject
    ) -> None:
        names, nbytes = model
        blocks: dict[str, int] = {}
        for name, size in zip(names, nbytes, strict=True):
            blocks[block_of(name)] = blocks.get(block_of(name), 0) + size
        parts = data.draw(st.integers(1, len(blocks)))
        fragments = cut(names, nbytes, parts, pattern)
        seen = [{block_of(names[p]) for p in one.parameters} for one in fragments]
        assert sum(map(len, seen)) == len(blocks)
        shares = [sum(nbytes[p] for p in one.parameters) for one in fragments]
        equal, largest = sum(nbytes) / parts, max(blocks.values())
        assert all(abs(share - equal) <= largest for share in shares)
        if pattern == "strided":
            assert max(shares) - min(shares) <= largest


def owners(names: list[str], nbytes: list[int], parts: int, pattern: str) -> list[int]:
    fragments = cut(names, nbytes, parts, pattern)
    at = {position: one.index for one in fragments for position in one.parameters}
    return [at[position] for position in range(len(names))]


BLOCKS = [f"h.{block}.weight" for block in range(6)]


class TestPatterns:
    def test_equal_blocks(self) -> None:
        assert owners(BLOCKS, [8] * 6, 2, "sequential") == [0, 0, 0, 1, 1, 1]
        assert owners(BLOCKS, [8] * 6, 2, "strided") == [0, 1, 0, 1, 0, 1]

    def test_a_large_one_counts_for_several(self) -> None:
        assert owners(BLOCKS, [24, 8, 8, 8, 8, 8], 2, "sequential") == [0, 0, 1, 1, 1, 1]
        assert owners(BLOCKS, [24, 8, 8, 8, 8, 8], 2, "strided") == [0, 1, 1, 1, 0, 1]

    def test_bytes_count_and_not_elements(self) -> None:
        model = nn.ParameterList([torch.zeros(4, dtype=torch.float64), *torch.zeros(4, 2)])
        fragments = ModelLocal([model]).split(2)
        assert [len(one.parameters) for one in fragments] == [1, 4]


NAMES = ["stages.0.0.w", "stages.0.1.a.w", "stages.0.1.b.w", "stages.1.0.w", "norm.w"]


class TestBlocks:
    @pytest.mark.parametrize(
        ("parts", "cuts"),
        [(3, [3, 1, 1]), (4, [1, 2, 1, 1]), (5, [1, 1, 1, 1, 1])],
        ids=["outer elements", "inner elements", "parameters"],
    )
    def test_the_largest_of_which_there_are_enough(self, parts: int, cuts: list[int]) -> None:
        found = owners(NAMES, [1] * 5, parts, "sequential")
        assert [len(list(same)) for _, same in groupby(found)] == cuts


@every_pattern
class TestWhereverItRuns:
    def test_stacked_nodes_and_a_process_cut_alike(self, pattern: str) -> None:
        stack, alone = StackedLocal(Tiny(), 2, Inner(), 1), ModelLocal([Tiny()])
        for parts in range(1, 9):
            assert stack.split(parts, pattern) == alone.split(parts, pattern)

    def test_more_fragments_than_parameters_are_refused(self, pattern: str) -> None:
        says = "8 parameters cannot be 9 fragments: use 1 to 8"
        for local in (ModelLocal([Tiny()]), StackedLocal(Tiny(), 2, Inner(), 1)):
            with pytest.raises(SettingsError, match=says):
                local.split(9, pattern)


class TestRefusals:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: DiLoCoRecipe(
                OptimSpec(torch.optim.SGD, lr=1.0), 4, fragments=2, pattern="stripes"
            ),
            lambda: StreamingDiLoCoStrategy(H=4, fragments=2, pattern="stripes"),
            lambda: ModelLocal([Tiny()]).split(2, "stripes"),
            lambda: StackedLocal(Tiny(), 2, Inner(), 1).split(2, "stripes"),
        ],
        ids=["recipe", "strategy", "process", "stacked"],
    )
    def test_another_pattern(self, make: Any) -> None:
        with pytest.raises(
            SettingsError, match="pattern='stripes': it must be one of sequential, strided"
        ):
            make()

    def test_modules_are_not_cut(self) -> None:
        model = Tiny()
        for parts, pattern in ((3, "sequential"), (2, "strided")):
            with pytest.raises(SettingsError, match="2 modules are that many fragments"):
                ModelLocal([model.first, model.second]).split(parts, pattern)
