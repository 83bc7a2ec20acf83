"""The quantised all-reduce among real processes: equal bits at all members, as few bytes
as promised, and no trace of those who are not counted or die."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from helpers.magnitudes import row_of, rows_of
from helpers.ranks import Rank, ranks
from helpers.steps import lone_step
from torch.distributed import ReduceOp
from torch.distributed.distributed_c10d import AllreduceOptions

from torchft.collectives import QuantizedMean, allreduce_quantized, as_bytes
from torchft.digest import digest
from torchft.manager.average import Average
from torchft.quantization import codec_names, codec_of, mean_bytes, quantized_mean

SIZES = (0, 1, 2, 7, 257, 1009, 5003)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(name, n, dtype) for name in codec_names() for n in SIZES for dtype in DTYPES]
SOON = timedelta(seconds=20)


def _average_everything(rank: Rank) -> None:
    group, members = rank.configure(), rank.world_size
    before = group.bytes_sent
    tensors = [row_of(rank.rank, n, dtype) for _, n, dtype in CASES]
    works = [
        QuantizedMean(group, tensor, range(members), name)
        for (name, _, _), tensor in zip(CASES, tensors, strict=True)
    ]  # all in flight
    for (name, n, dtype), tensor, work in zip(CASES, tensors, works, strict=True):
        assert work.wait(SOON)
        alone = quantized_mean(rows_of(members, n, dtype), codec_of(name))[0]
        assert torch.equal(as_bytes(tensor), as_bytes(alone)), (name, n, dtype)
    expected = sum(mean_bytes(codec_of(name), n, members) for name, n, _ in CASES)
    assert group.bytes_sent - before == expected
    rank.tell(digest(tensors))


@pytest.mark.parametrize("members", [2, 3, 5])
def test_every_member_has_the_bits_that_one_process_would_compute(members: int) -> None:
    with ranks(members, _average_everything) as world:
        assert len(set(world.hear_all())) == 1


def _average_without_rank_1(rank: Rank) -> None:
    group, tensor = rank.configure(), row_of(rank.rank, 700)
    if rank.rank == 1:
        tensor.fill_(float("nan"))
    QuantizedMean(group, tensor, [0, 2], "int8").wait(SOON)
    alone = quantized_mean(rows_of(3, 700), codec_of("int8"), [0, 2])[0]
    rank.tell(torch.equal(tensor, alone))


def test_a_member_that_is_not_counted_leaves_no_trace() -> None:
    with ranks(3, _average_without_rank_1) as world:
        assert world.hear_all() == [True] * 3


def _say_what_is_left(rank: Rank, counted: list[int]) -> None:
    group, members = rank.configure(), rank.world_size
    for name, n, dtype in CASES:
        tensor, error_feedback = row_of(rank.rank, n, dtype), row_of(rank.rank + 7, n)
        QuantizedMean(group, tensor, counted, name, error_feedback=error_feedback).wait(SOON)
        everybodys = torch.stack([row_of(member + 7, n) for member in range(members)])
        alone = quantized_mean(rows_of(members, n, dtype), codec_of(name), counted, everybodys)[0]
        assert torch.equal(as_bytes(tensor), as_bytes(alone)), (name, n, dtype)
        assert torch.equal(error_feedback, everybodys[rank.rank]), (name, n, dtype)
    rank.tell("equal")


@pytest.mark.parametrize(("members", "counted"), [(2, [0, 1]), (3, [0, 2]), (5, [0, 1, 2, 3, 4])])
def test_each_member_knows_to_the_bit_what_did_not_arrive(members: int, counted: list[int]) -> None:
    with ranks(members, _say_what_is_left, counted) as world:
        assert world.hear_all() == ["equal"] * members


def _average_a_nan(rank: Rank, codec: str, bad: float) -> None:
    group, tensor = rank.configure(), torch.ones(1000)
    if rank.rank == 1:
        tensor[700] = bad
    QuantizedMean(group, tensor, range(3), codec).wait(SOON)
    rank.tell((bool(tensor[700].isfinite()), bool(tensor[:256].isfinite().all()), digest(tensor)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8", "int4"])
def test_what_one_member_has_overflown_all_members_see(codec: str, bad: float) -> None:
    with ranks(3, _average_a_nan, codec, bad) as world:
        heard = world.hear_all()
        assert heard[0][:2] == (False, True)
        assert heard.count(heard[0]) == 3


def _die_between_the_halves(rank: Rank) -> None:
    group = rank.configure()
    step = lone_step(pg=group)
    tensors = [torch.ones(1000), torch.ones(3)]
    works = [QuantizedMean(group, tensor, range(3), "int8") for tensor in tensors]
    averages = [
        Average(step, work, tensor, 1, group.generation)
        for work, tensor in zip(works, tensors, strict=True)
    ]
    for work in works:
        work._chunks.wait()  # the first half of both is done everywhere
    rank.tell("half")
    rank.listen()
    for average in averages:
        average.wait(SOON)
    unchanged = all((tensor == 1).all() for tensor in tensors)
    rank.tell((str(step.error), unchanged))


def test_a_member_that_dies_between_the_halves_frees_the_others() -> None:
    with ranks(3, _die_between_the_halves) as world:
        world.hear_all()
        world.kill(1)
        world.tell("go on", 0, 2)
        for error, unchanged in world.hear_all(0, 2):
            assert "the all-reduce of (1000,) failed" in error
            assert unchanged


def _sum_and_average(rank: Rank) -> None:
    group, members = rank.configure(), rank.world_size
    opts = AllreduceOptions()
    opts.reduceOp = ReduceOp.AVG
    tensors = [row_of(rank.rank, n) for n in (300, 7, 0)]
    averaging = allreduce_quantized(tensors[:2], opts, group)
    summing = allreduce_quantized(tensors[2:], ReduceOp.SUM, group, codec="fp8")
    third = row_of(rank.rank, 41)
    tripled = allreduce_quantized([third], ReduceOp.SUM, group, codec="int4")
    for work in (averaging, summing, tripled):
        assert not work.is_completed()
        assert work.wait(SOON) and work.wait() and work.is_completed()
    for tensor in tensors[:2]:
        rows = rows_of(members, tensor.numel())
        assert torch.equal(tensor, quantized_mean(rows, codec_of("int8"))[0])
    assert torch.equal(third, quantized_mean(rows_of(members, 41), codec_of("int4"))[0] * members)
    rank.tell("equal")


def test_several_tensors_are_summed_or_averaged_in_place() -> None:
    with ranks(3, _sum_and_average) as world:
        assert world.hear_all() == ["equal"] * 3
