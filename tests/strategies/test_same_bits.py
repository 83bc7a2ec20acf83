"""The same bits whether a node has a process of its own or is one row of many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchft.ordered import ordered_mean, ordered_sum
from torchft.quantization import Int4, quantized_mean
from torchft.simulator.stacked import StackedLocal
from torchft.strategies import (
    AllReduceRecipe,
    Clock,
    DeMoRecipe,
    DiLoCoRecipe,
    Inner,
    LocalSGDRecipe,
    ModelLocal,
    OptimSpec,
    PartitionedIndexSelector,
    RandomIndexSelector,
    Recipe,
    SpartaRecipe,
    TopKRecipe,
)
from torchft.strategies.recipe import By

OUTER = OptimSpec(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
RECIPES: dict[str, Callable[[], Recipe]] = {
    "DeMo": lambda: DeMoRecipe(decay=0.9, topk=4, chunk=64),
    "DeMo, clipped": lambda: DeMoRecipe(decay=0.9, topk=4, chunk=64, max_norm=0.5),
    "DeMo, over senders": lambda: DeMoRecipe(decay=0.9, topk=4, chunk=64, mean_over="senders"),
    "top-k": lambda: TopKRecipe(OUTER, 1, topk=7, chunk=100, mean_over="members"),
    "top-k of tensors, over senders": lambda: TopKRecipe(
        OUTER, 1, topk=7, chunk=100, mean_over="senders", chunks_of="tensor"
    ),
    "LocalSGD, weighed by samples": lambda: LocalSGDRecipe(1, weighting="samples"),
    "SPARTA": lambda: SpartaRecipe(RandomIndexSelector(0.1)),
    "SPARTA in turn": lambda: SpartaRecipe(PartitionedIndexSelector(0.1)),
    "DiLoCo": lambda: DiLoCoRecipe(OUTER, 1),
    "DiLoCo, mixed": lambda: DiLoCoRecipe(OUTER, 1, mix=0.3),
    "Streaming": lambda: DiLoCoRecipe(OUTER, 3, fragments=3, mix=0.3),
    "Streaming, strided": lambda: DiLoCoRecipe(OUTER, 3, fragments=3, pattern="strided", mix=0.3),
    "DiLoCo, int4, fed back": lambda: fed_back(DiLoCoRecipe(OUTER, 1, error_feedback=True)),
    "all-reduce, int4, fed back": lambda: fed_back(AllReduceRecipe(error_feedback=True)),
    "LocalSGD": lambda: LocalSGDRecipe(1),
}


def fed_back(recipe: Recipe) -> Recipe:
    recipe.codec = Int4()
    return recipe


class Odd(nn.Module):
    """Sides that are no multiples of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(37, 53), nn.Conv2d(5, 7, 3), nn.Linear(130, 66)
        self.d = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("rows", [5, 12])
@pytest.mark.parametrize("name", RECIPES)
def test_one_row_and_many_rows_compute_the_same_bits(name: str, rows: int) -> None:
    check_bits(name, rows, torch.float32)


HALF = [
    "LocalSGD",
    "LocalSGD, weighed by samples",
    "top-k of tensors, over senders",
    "DiLoCo",
    "DiLoCo, mixed",
    "Streaming, strided",
]


@pytest.mark.parametrize("name", [*HALF, "DiLoCo, int4, fed back"])
def test_half_precision_beside_fp32_shared_state_too(name: str) -> None:
    check_bits(name, 12, torch.bfloat16)


def check_bits(name: str, rows: int, dtype: torch.dtype) -> None:
    stack = StackedLocal(Odd().to(dtype), rows, Inner(), 1)
    alone = [ModelLocal([Odd().to(dtype)]) for _ in range(rows)]
    recipes = [RECIPES[name]() for _ in range(rows + 1)]
    clock = Clock()
    stack.samples = [7 * row + 1 for row in range(rows)]
    for row, local in enumerate(alone):
        local.samples = [7 * row + 1]
    for local, parameters in zip(alone, stack.parameters, strict=True):
        copy_values(parameters, local.parameters)
    for recipe, local in zip(recipes, [stack, *alone], strict=True):
        recipe.bind(local, clock)
    for step in range(3):
        clock.steps = step + 1
        stack.zero_grads()
        for row, local in enumerate(alone):
            disturb(stack.parameters[row], seed=100 * step + row)
            copy_values(stack.parameters[row], local.parameters)
        sent = [recipe.contribution(recipe.fragment()) for recipe in recipes]
        for row in range(rows):
            for many, one in zip(sent[0][0], sent[1 + row][0], strict=True):
                assert torch.equal(many[row : row + 1], one)
        leave_unsaid(recipes[0], sent)
        for recipe, (tensors, draft) in zip(recipes, sent, strict=True):
            received = receive(recipe, [tensors for tensors, _ in sent[1:]])
            fragment = recipe.fragment()
            update = recipe.apply(fragment, [t.clone() for t in received])
            recipe.apply_locally(fragment, update, draft)
            recipe.local.release(tensors, reusable=True)
        for row, local in enumerate(alone):
            for mine, theirs in zip(stack.parameters[row], local.parameters, strict=True):
                assert torch.equal(mine, theirs)
                assert mine.grad is not None and theirs.grad is not None
                assert torch.equal(mine.grad, theirs.grad)
            for name_, tensors in recipes[1 + row].own.items():
                for one, many in zip(tensors, recipes[0].own[name_], strict=True):
                    assert torch.equal(one, many[row : row + 1])


def leave_unsaid(recipe: Recipe, sent: list[Any]) -> None:
    """What a round does with the drafts: of all rows, and of each alone."""
    if not recipe.error_feedback:
        return
    (stacked, draft), *alone = sent
    for at, tensor in enumerate(stacked):
        quantized_mean(tensor, Int4(), None, draft[at])
        for row, (_, one) in enumerate(alone):
            one[at].copy_(draft[at][row])


@torch.no_grad()
def disturb(parameters: list[nn.Parameter], seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(torch.randn(p.shape, generator=draws), alpha=0.1)
        p.grad = torch.randn(p.shape, generator=draws).to(p.dtype)


@torch.no_grad()
def copy_values(source: list[nn.Parameter], target: list[nn.Parameter]) -> None:
    for mine, theirs in zip(target, source, strict=True):
        mine.copy_(theirs)
        mine.grad = None if theirs.grad is None else theirs.grad.clone()


def receive(recipe: Recipe, sent: list[list[Tensor]]) -> list[Tensor]:
    columns = [torch.cat(column) for column in zip(*sent, strict=True)]
    if recipe.codec is not None:
        return [quantized_mean(column, recipe.codec) for column in columns]
    return columns if recipe.by is By.GATHER else [ordered_mean(c) for c in columns]


class TestOrderedSum:
    """Row by row, in the order that is asked for."""

    @pytest.mark.parametrize("rows", [1, 2, 4, 12, 64])
    @pytest.mark.parametrize("size", [1, 7, 16, 1001])
    def test_it_is_a_plain_loop_to_the_bit(self, rows: int, size: int) -> None:
        values = torch.randn(rows, size, generator=torch.Generator().manual_seed(rows))
        expected = values[0].tolist()
        for row in values[1:].tolist():
            expected = [float(torch.tensor(a + b)) for a, b in zip(expected, row, strict=True)]
        total = ordered_sum(values)
        assert total.shape == (1, size)
        assert total[0].tolist() == expected
        mean = [float(torch.tensor(e) / rows) for e in expected]
        assert ordered_mean(values)[0].tolist() == mean

    @pytest.mark.parametrize("rows", [12, 64])
    def test_a_library_sum_is_another_one(self, rows: int) -> None:
        """Else there would be no need for it."""
        values = torch.randn(rows, 1001, generator=torch.Generator().manual_seed(rows))
        assert not torch.equal(ordered_sum(values)[0], values.sum(0))

    def test_rows_of_a_larger_storage_and_in_another_order(self) -> None:
        wide = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
        values = wide[:, 3:34]
        order = [7, 2, 11, 0]
        expected = ((values[7] + values[2]) + values[11]) + values[0]
        assert torch.equal(ordered_sum(values, order)[0], expected)
        assert torch.equal(ordered_mean(values, order)[0], expected / 4)
        assert ordered_sum(values, order).is_contiguous()

    def test_the_rows_stand(self) -> None:
        values = torch.ones(3, 2)
        ordered_mean(values)
        assert values.tolist() == [[1.0, 1.0]] * 3

    @pytest.mark.parametrize("which", [None, []])
    def test_no_rows_are_refused(self, which: Any) -> None:
        with pytest.raises(ValueError, match="no rows"):
            ordered_sum(torch.empty(0 if which is None else 3, 2), which)
