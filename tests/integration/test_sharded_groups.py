"""Models that FSDP2 shards over the ranks of a group: groups average, die, come and heal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sharded import RANKS, Sharded, mesh_of_group, net, shard
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from world import KILLED, Group, World

from torchft.errors import MismatchError


@pytest.mark.parametrize("transport", ["http", "process group", "in place"])
def test_each_rank_heals_its_own_shards(tmp_path: Path, transport: str) -> None:
    """A group trains alone, one that comes later heals weights and moments, and both go on."""

    def first(group: Group) -> str:
        one = Sharded(group, transport=transport)
        one.until(3)
        group.world.happen(f"trained {group.rank}")
        while one.manager.num_participants() < 2:
            one.step()
        return one.until(30)

    def later(group: Group) -> str:
        for rank in range(RANKS):
            group.world.wait(f"trained {rank}")
        return Sharded(group, transport=transport).until(30)

    ends = World(tmp_path).run(first, later, ranks=RANKS)
    assert ends[:RANKS] == ends[RANKS:]
    assert ends[0] != ends[1]


def test_a_killed_group_leaves_equal_shards(tmp_path: Path) -> None:
    def stays(group: Group) -> str:
        return Sharded(group).until(8)

    def dies(group: Group) -> str:
        one = Sharded(group)
        one.until(4)
        group.dies()
        return ""

    ends = World(tmp_path, min_replicas=2).run(stays, stays, dies, ranks=RANKS)
    assert ends[:2] == ends[2:4]
    assert ends[4:] == [KILLED, KILLED]


def over_dp(group: Group) -> nn.Module:
    return fully_shard(net(), mesh=mesh_of_group(group, ("dp",)))


def in_columns(group: Group) -> nn.Module:
    def cut(_: str, layer: nn.Module, mesh: DeviceMesh) -> None:
        for name, p in list(layer.named_parameters(recurse=False)):
            columns = distribute_tensor(p.detach(), mesh, [Shard(p.ndim - 1)])
            layer.register_parameter(name, nn.Parameter(columns))

    return distribute_module(net(), mesh_of_group(group), cut)


def in_two_dimensions(group: Group) -> nn.Module:
    mesh = mesh_of_group(group, ("replicate", "shard"), (1, RANKS))
    return fully_shard(net(), mesh=mesh)


def not_sharded(group: Group) -> nn.Module:
    return net()


def in_half_precision(group: Group) -> nn.Module:
    return shard(group, net().bfloat16())


WAYS: list[Any] = [
    pytest.param(over_dp, r"0.bias is .* over dp=2 .* over fsdp=2", id="names of the mesh"),
    pytest.param(in_columns, r"0.weight is .*shard\(1\) over .*shard\(0\) over", id="dimension"),
    pytest.param(in_two_dimensions, r"0.bias is .*=1, shard=2 .* over fsdp=2", id="mesh"),
    pytest.param(not_sharded, r"0.bias is \[5\] float32 here .*shard\(0\)", id="not sharded"),
    pytest.param(in_half_precision, r"0.bias is .*bfloat16 here .*float32 there", id="dtype"),
]


@pytest.mark.parametrize(("make", "reason"), WAYS)
def test_a_group_that_is_sharded_in_another_way_ends_with_the_reason(
    tmp_path: Path, make: Callable[[Group], nn.Module], reason: str
) -> None:
    _refused(tmp_path, reason, lambda group: Sharded(group, make))


def test_it_ends_with_the_reason_at_the_latest_when_it_would_load_the_state(
    tmp_path: Path,
) -> None:
    def unwrapped(manager: Any, model: nn.Module) -> nn.Module:
        return model

    _refused(
        tmp_path,
        r"over fsdp=2 at the donor and .* over dp=2 here",
        lambda group: Sharded(group, over_dp, wrap=unwrapped),
        first=lambda group: Sharded(group, wrap=unwrapped),
    )


def _refused(
    folder: Path,
    reason: str,
    other: Callable[[Group], Sharded],
    first: Callable[[Group], Sharded] = Sharded,
) -> None:
    def trains(group: Group) -> str:
        one = first(group)
        one.until(2)
        group.world.happen(f"trained {group.rank}")
        while not group.world.happened("refused 0") or not group.world.happened("refused 1"):
            one.step()
        return one.digest()

    def joins(group: Group) -> str:
        for rank in range(RANKS):
            group.world.wait(f"trained {rank}")
        with pytest.raises(MismatchError, match=reason):
            other(group).until(30)
        group.world.happen(f"refused {group.rank}")
        return "refused"

    ends = World(folder).run(trains, joins, ranks=RANKS)
    assert ends[RANKS:] == ["refused", "refused"]
