"""The ordered all-reduce among real processes, and what is left of it when one of them dies."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from helpers.magnitudes import row_of, rows_of
from helpers.ranks import Rank, ranks
from helpers.steps import lone_step
from torch import Tensor

from torchft.collectives import OrderedMean, as_bytes
from torchft.manager.average import Average
from torchft.ordered import ordered_bytes, ordered_mean

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 3, 7, 12, 13, 1009)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(as_bytes(one), as_bytes(other))


def _average_everything(rank: Rank) -> None:
    group, members = rank.configure(), rank.world_size
    cases = [(size, dtype) for dtype in DTYPES for size in SIZES]
    before = group.bytes_sent
    tensors = [row_of(rank.rank, size, dtype) for size, dtype in cases]
    works = [OrderedMean(group, tensor, range(members)) for tensor in tensors]  # all in flight
    for (size, dtype), tensor, work in zip(cases, tensors, works, strict=True):
        assert work.wait(timedelta(seconds=20)) and work.is_completed()
        assert _same_bits(tensor, ordered_mean(rows_of(members, size, dtype))[0]), (size, dtype)
    expected = sum(ordered_bytes(size, dtype.itemsize, members) for size, dtype in cases)
    assert group.bytes_sent - before == expected
    rank.tell("equal")


@pytest.mark.parametrize("members", [2, 3, 5, 12])
def test_every_member_has_the_bits_of_the_ordered_mean(members: int) -> None:
    with ranks(members, _average_everything) as world:
        assert world.hear_all() == ["equal"] * members


def _average_a_matrix_without_rank_1(rank: Rank) -> None:
    group = rank.configure()
    # Minus zero at the counted members: zeros added for the others would lose its sign.
    mine = torch.full((3, 5), float("nan") if rank.rank == 1 else -0.0)
    tensor = mine.clone().T  # not contiguous
    OrderedMean(group, tensor, [0, 2]).wait()
    assert torch.equal(tensor, torch.zeros(5, 3)) and torch.signbit(tensor).all()
    nobody = torch.ones(4)
    OrderedMean(group, nobody, []).wait()
    assert nobody.tolist() == [0.0] * 4
    rank.tell("equal")


def test_a_member_that_is_not_counted_takes_part_and_leaves_no_trace() -> None:
    with ranks(3, _average_a_matrix_without_rank_1) as world:
        assert world.hear_all() == ["equal"] * 3


def _die_between_the_halves(rank: Rank) -> None:
    group = rank.configure()
    step = lone_step(pg=group)
    tensor = torch.ones(7)
    works = [OrderedMean(group, tensor, range(3)), OrderedMean(group, torch.ones(2), range(3))]
    averages = [Average(step, w, tensor, 1, group.generation) for w in works]
    for work in works:
        work._chunks.wait()  # the first half of both is done everywhere
    rank.tell("half")
    rank.listen()
    for average in averages:
        average.wait(timedelta(seconds=20))
    rank.tell((str(step.error), tensor.tolist()))


def test_a_member_that_dies_between_the_halves_frees_the_others() -> None:
    with ranks(3, _die_between_the_halves) as world:
        world.hear_all()
        world.kill(1)
        world.tell("go on", 0, 2)
        for error, tensor in world.hear_all(0, 2):
            assert "the all-reduce of (7,) failed" in error
            assert tensor == [1.0] * 7


def _wait_for_the_silent(rank: Rank) -> None:
    group = rank.configure()
    rank.tell("there")
    rank.listen()
    tensor = torch.full((5,), float(rank.rank))
    work = OrderedMean(group, tensor, range(3))
    if rank.rank == 0:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                work.wait(timedelta(milliseconds=20))
        rank.tell("waited in vain")
    work.wait(timedelta(seconds=20))
    rank.tell(tensor.tolist())


def test_a_wait_that_was_too_short_is_taken_up_again() -> None:
    with ranks(3, _wait_for_the_silent) as world:
        world.hear_all()
        world.tell("go on", 0, 1)
        assert world.hear(0) == "waited in vain"
        world.tell("go on", 2)
        assert world.hear_all() == [[1.0] * 5] * 3
