"""Quantised averages among real groups: the bits of one process, the bytes as promised, and codecs
that differ are named before anything is mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ReduceOp
from world import Group, World

from torchft.errors import MismatchError, SettingsError
from torchft.manager.peers import ManagerPeers, ManagerRound
from torchft.peers import Place
from torchft.quantization import Codec, Int8, codec_of, mean_bytes, quantized_mean
from torchft.strategies import AllReduceRecipe, ModelLocal, Strategy

N = 1001


def _numbers(group: int) -> Tensor:
    return torch.randn(7, N // 7, generator=torch.Generator().manual_seed(group))


def _mean(codec: str | Codec, groups: int) -> Tensor:
    return quantized_mean(torch.stack([_numbers(g) for g in range(groups)]), codec_of(codec))[0]


def test_a_manager_averages_and_sums_encoded_numbers(tmp_path: Path) -> None:
    cases: list[Any] = [True, "fp8", "int4", Int8(64), codec_of("bf16")]

    def story(group: Group) -> list[bool]:
        manager = group.manager(use_async_quorum=False, min_replica_size=3)
        manager.start_quorum()
        averages = [_numbers(group.number) for _ in cases]
        sums = [_numbers(group.number) for _ in cases]
        for tensor, how in zip(averages, cases, strict=True):
            manager.allreduce(tensor, should_quantize=how).wait()
        for tensor, how in zip(sums, cases, strict=True):  # the vote finishes them
            manager.allreduce(tensor, should_quantize=how, reduce_op=ReduceOp.SUM)
        assert manager.should_commit()
        means = [_mean("int8" if how is True else how, 3) for how in cases]
        return [
            *map(torch.equal, averages, means),
            *(torch.equal(total, 3 * mean) for total, mean in zip(sums, means, strict=True)),
        ]

    assert World(tmp_path, min_replicas=3).run(story, story, story) == [[True] * 10] * 3


def test_what_a_codec_cannot_hold_is_refused_and_the_step_goes_on(tmp_path: Path) -> None:
    def story(group: Group) -> tuple[int, bool]:
        manager = group.manager(use_async_quorum=False, min_replica_size=2)
        manager.start_quorum()
        before = group.pg.bytes_sent
        with pytest.raises(SettingsError, match="int8 encodes floating-point"):
            manager.allreduce(torch.ones(3, dtype=torch.int64), should_quantize=True)
        with pytest.raises(SettingsError, match="no float64: cast it"):
            manager.allreduce(torch.ones(3).double(), should_quantize="fp32")
        with pytest.raises(SettingsError, match="codec='int5': it must be one of fp32, bf16"):
            manager.allreduce(torch.ones(3), should_quantize="int5")
        with pytest.raises(SettingsError, match="error_feedback goes with a codec"):
            manager.allreduce(torch.ones(3), error_feedback=torch.ones(3))
        with pytest.raises(NotImplementedError, match="SUM or AVG"):
            manager.allreduce(torch.ones(3), should_quantize=True, reduce_op=ReduceOp.MAX)
        round_ = ManagerRound(
            manager.steps, manager.steps.take()
        )  # before it sends its first tensor
        with pytest.raises(SettingsError, match="no float64"):
            round_.average([torch.ones(1, 3), torch.ones(1, 3).double()], codec_of("fp32"))
        return group.pg.bytes_sent - before, round_.close()

    assert World(tmp_path, min_replicas=2).run(story, story) == [(0, True)] * 2


def test_bytes_of_an_outer_step_between_two_processes(tmp_path: Path) -> None:
    names = (None, "bf16", "fp8", "int8", "int4")

    def story(group: Group) -> list[int]:
        manager = group.manager(use_async_quorum=False, min_replica_size=2)
        peers, sent = ManagerPeers(manager), []
        for name in names:
            opened = peers.open(Place.BEFORE)
            before = group.pg.bytes_sent
            delta = torch.full((1, 1_000_003), float(group.number + 1))
            codec = None if name is None else codec_of(name)
            (mean,) = opened.average([delta], codec).wait()
            assert opened.close()
            assert abs(mean.mean().item() - 1.5) < 0.01
            sent.append(group.pg.bytes_sent - before)
        return sent

    one, other = World(tmp_path, min_replicas=2).run(story, story)
    assert one == other
    fp32, bf16, fp8, int8, int4 = one
    print(dict(zip(names, one, strict=True)))
    assert bf16 <= 0.51 * fp32
    assert fp8 == int8 <= 0.27 * fp32
    assert int4 <= 0.15 * fp32
    assert one[1:] == [mean_bytes(codec_of(str(name)), 1_000_003, 2) for name in names[1:]]


@pytest.mark.parametrize("codec", ["fp8", None])
def test_a_group_with_another_codec_is_told_before_anything_is_mixed(
    tmp_path: Path, codec: str | None
) -> None:
    def story(group: Group) -> str:
        manager = group.manager(use_async_quorum=False)
        recipe, local = AllReduceRecipe(), ModelLocal([torch.nn.Linear(3, 1)])
        mine = "int8" if group.number == 0 else codec
        recipe.codec = None if mine is None else codec_of(mine)
        strategy = Strategy([recipe]).bind(local, ManagerPeers(manager))
        try:
            strategy.begin()
            return str(manager.errored())
        except MismatchError as error:
            return f"refused: {error}"
        finally:
            assert group.pg.bytes_sent == 0

    right, wrong = World(tmp_path, min_replicas=2).run(story, story)
    there = codec or "absent"
    assert wrong.startswith("refused: group_1")
    assert f"codec is {there} here and int8 there" in wrong
    assert f"codec is int8 here and {there} there" in right
