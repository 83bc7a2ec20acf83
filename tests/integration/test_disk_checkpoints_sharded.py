"""Checkpoints of models that FSDP2 shards, read by groups with as many ranks, or with fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from world import Group, World

from torchft.checkpointing.disk import DiskCheckpoints
from torchft.digest import digest
from torchft.errors import MismatchError, SettingsError
from torchft.optim import OptimizerWrapper

# torch loads its compiler when a process makes its first optimizer: once, before the groups fork.
torch.optim.SGD([torch.zeros(1)], lr=0.1)

RANKS, SAVED = 2, 4


class Sharded:
    """A model whose rows do not divide evenly, over this group's ranks; sharded unless `whole`."""

    def __init__(self, group: Group, folder: Path, ranks: int, *, whole: bool = False) -> None:
        self.rank = group.rank
        store = dist.PrefixStore("fsdp", group._store)
        dist.init_process_group("gloo", store=store, rank=group.rank, world_size=ranks)
        torch.manual_seed(group.number)  # each begins with weights of its own
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        if not whole:
            mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
            fully_shard(self.model, mesh=mesh)
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.rng = torch.Generator().manual_seed(group.rank)
        self.manager = group.manager(load_state_dict=None, state_dict=None, use_async_quorum=False)
        self.manager.register(model=self.model, optimizer=self.inner, rng=self.rng)
        self.optimizer = OptimizerWrapper(self.manager, self.inner)
        self.checkpoints = DiskCheckpoints(self.manager, folder, SAVED)

    def step(self) -> None:
        self.optimizer.zero_grad()
        torch.rand(1, generator=self.rng)
        torch.manual_seed(self.manager.current_step())
        self.model(torch.randn(4, 3)).square().sum().backward()
        assert self.optimizer.step()
        self.checkpoints.save_if_due()

    def until(self, step: int) -> Any:
        while self.manager.current_step() < step:
            self.step()
        self.checkpoints.close()
        return self.whole()

    def whole(self) -> tuple[str, str]:
        """Digests of the model and the moments put together, and of this rank's generator."""
        state = [self.model.state_dict(), self.inner.state_dict()["state"]]
        return digest(_joined(state)), digest(self.rng.get_state())


def _joined(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: _joined(inner) for key, inner in value.items()}
    return [_joined(inner) for inner in value] if isinstance(value, list) else value


def saved_by_two_ranks(tmp_path: Path) -> list[tuple[str, str]]:
    def saves(group: Group) -> Any:
        return Sharded(group, tmp_path / "checkpoints", RANKS).until(SAVED)

    (tmp_path / "first").mkdir()
    return World(tmp_path / "first").run(saves, ranks=RANKS)


@pytest.mark.parametrize("ranks, whole", [(2, False), (1, False), (1, True)])
def test_a_group_with_other_ranks_goes_on_with_the_same_weights_and_moments(
    tmp_path: Path, ranks: int, whole: bool
) -> None:
    saved = saved_by_two_ranks(tmp_path)
    assert saved[0][0] == saved[1][0] and saved[0][1] != saved[1][1]

    def goes_on(group: Group) -> Any:
        one = Sharded(group, tmp_path / "checkpoints", ranks, whole=whole)
        return one.checkpoints.load_newest(), one.whole(), one.until(SAVED + 1) is not None

    (tmp_path / "second").mkdir()
    ends = World(tmp_path / "second").run(goes_on, ranks=ranks)
    assert ends == [(SAVED, saved[rank], True) for rank in range(ranks)]


def test_a_group_with_more_ranks_takes_what_is_not_sharded_from_rank_0(tmp_path: Path) -> None:
    saved = saved_by_two_ranks(tmp_path)

    def goes_on(group: Group) -> Any:
        one = Sharded(group, tmp_path / "checkpoints", 3)
        one.checkpoints.load_newest()
        return one.whole()

    (tmp_path / "second").mkdir()
    assert World(tmp_path / "second").run(goes_on, ranks=3) == [saved[0], saved[1], saved[0]]


def test_a_whole_model_is_not_loaded_into_a_sharded_one(tmp_path: Path) -> None:
    def saves(group: Group) -> Any:
        return Sharded(group, tmp_path / "checkpoints", 1, whole=True).until(SAVED)

    def refuses(group: Group) -> None:
        checkpoints = Sharded(group, tmp_path / "checkpoints", 1).checkpoints
        with pytest.raises(MismatchError, match=r"\['0.weight'\] is a plain tensor .* fsdp=1 here"):
            checkpoints.load_newest()

    for name, story in ("first", saves), ("second", refuses):
        (tmp_path / name).mkdir()
        World(tmp_path / name).run(story)


def test_ranks_that_torch_distributed_does_not_connect_are_refused(tmp_path: Path) -> None:
    def story(group: Group) -> None:
        manager = group.manager()
        with pytest.raises(SettingsError, match=r"group of 2, and torch\.distributed connects 0"):
            DiskCheckpoints(manager, tmp_path, SAVED)
        group.world.happen(f"refused {group.rank}")
        group.world.wait(f"refused {1 - group.rank}")  # rank 0 serves the store till then

    World(tmp_path).run(story, ranks=RANKS)
