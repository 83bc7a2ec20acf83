"""Models that FSDP2 shards over the ranks of a group: groups average, die, come and heal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from world import KILLED, Group, World

from torchft.checkpointing import CheckpointTransport, HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport
from torchft.digest import digest
from torchft.errors import MismatchError
from torchft.optim import OptimizerWrapper
from torchft.sharded import local_part

RANKS = 2


class Sharded:
    """A model whose rows do not divide evenly, sharded by FSDP2 over this group's ranks."""

    def __init__(self, group: Group, transport: str = "http", names: str = "fsdp") -> None:
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("fsdp", group._store), rank=group.rank, world_size=RANKS
        )
        torch.manual_seed(group.number)  # each begins with weights of its own
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=(names,))
        fully_shard(self.model, mesh=mesh)
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.number = group.number
        self.manager = group.manager(
            state_dict=self.state_dict,
            load_state_dict=self.load_state_dict,
            use_async_quorum=False,
            checkpoint_transport=self._transport(group, transport),
        )
        self.optimizer = OptimizerWrapper(self.manager, self.inner)

    def _transport(self, group: Group, kind: str) -> CheckpointTransport[Any]:
        if kind == "http":
            return HTTPTransport(timeout=group.pg._timeout, num_chunks=0)
        where: dict[str, Callable[[], Any]] = (
            {"state_dict": lambda: {"user": {"default": self.state_dict()}, "torchft": {}}}
            if kind == "in place"
            else {}
        )
        return PGTransport(group.pg, timeout=group.pg._timeout, device=torch.device("cpu"), **where)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["optimizer"])

    def step(self) -> None:
        self.optimizer.zero_grad()
        at = self.manager.current_step()
        torch.manual_seed(1000 * self.number + at)
        self.model(torch.randn(4, 3)).square().sum().backward()
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            self.manager.allreduce(local_part(parameter.grad)).wait()
        self.optimizer.step()

    def until(self, step: int) -> str:
        while self.manager.current_step() < step:
            self.step()
        return digest(self.state_dict())


@pytest.mark.parametrize("transport", ["http", "process group", "in place"])
def test_each_rank_heals_its_own_shards(tmp_path: Path, transport: str) -> None:
    """A group trains alone, one that comes later heals weights and moments, and both go on."""

    def first(group: Group) -> str:
        one = Sharded(group, transport)
        one.until(3)
        group.world.happen(f"trained {group.rank}")
        while one.manager.num_participants() < 2:
            one.step()
        return one.until(30)

    def later(group: Group) -> str:
        for rank in range(RANKS):
            group.world.wait(f"trained {rank}")
        return Sharded(group, transport).until(30)

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


def test_a_group_that_is_sharded_in_another_way_ends_with_the_reason(tmp_path: Path) -> None:
    def first(group: Group) -> str:
        one = Sharded(group)
        one.until(2)
        group.world.happen(f"trained {group.rank}")
        while not group.world.happened("refused 0") or not group.world.happened("refused 1"):
            one.step()
        return ""

    def other(group: Group) -> str:
        for rank in range(RANKS):
            group.world.wait(f"trained {rank}")
        one = Sharded(group, names="dp")
        with pytest.raises(MismatchError, match=r"over fsdp=2 at the donor and .* over dp=2 here"):
            one.until(30)
        group.world.happen(f"refused {group.rank}")
        return "refused"

    ends = World(tmp_path).run(first, other, ranks=RANKS)
    assert ends[RANKS:] == ["refused", "refused"]
