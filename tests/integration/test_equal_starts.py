"""Groups that start from checkpoints of the same step start from equal state, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from world import Group, World

from torchft.ddp import DistributedDataParallel
from torchft.errors import MismatchError
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper

SAVED = {"step": 40, "batches_committed": 80}
"""What the manager has in the checkpoints of all groups."""


class Trainer:
    """Goes on from step 40 with weights of one `seed`."""

    def __init__(self, group: Group, *, seed: int, lr: float = 0.1, **options: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.inner = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.manager: Manager = group.manager(
            **{"load_state_dict": lambda _: None, "state_dict": dict, **options}
        )
        self.manager.load_state_dict(SAVED)

    def ddp(self) -> Trainer:
        self.wrapped = DistributedDataParallel(self.manager, self.model)
        self.optimizer = OptimizerWrapper(self.manager, self.inner)
        return self

    def step(self) -> bool:
        self.optimizer.zero_grad()
        self.wrapped(torch.randn(3, 2)).sum().backward()
        return self.optimizer.step()


def refusal(train: Callable[[], Any]) -> str:
    with pytest.raises(MismatchError) as error:
        train()
    return str(error.value)


@pytest.mark.parametrize("init_sync", [True, False])
def test_other_weights_at_the_same_step_are_refused_in_both_groups(
    tmp_path: Path, init_sync: bool
) -> None:
    def story(group: Group) -> str:
        trainer = Trainer(group, seed=group.number, init_sync=init_sync).ddp()
        return refusal(trainer.step)

    for said in World(tmp_path, min_replicas=2).run(story, story):
        assert "starts at step 40 from other state than" in said
        assert "DistributedDataParallel: 0.bias is" in said


def test_another_learning_rate_is_named(tmp_path: Path) -> None:
    def story(group: Group) -> str:
        return refusal(Trainer(group, seed=1, lr=0.1 + group.number).ddp().step)

    for said in World(tmp_path, min_replicas=2).run(story, story):
        assert "optimizer: lr of group 0 is" in said


def test_equal_weights_go_on_although_buffers_and_random_numbers_differ(tmp_path: Path) -> None:
    def story(group: Group) -> tuple[int, bool]:
        trainer = Trainer(group, seed=1).ddp()
        torch.manual_seed(group.number)
        trainer.model(torch.randn(3, 2))  # moves the running mean
        assert trainer.step() and trainer.step()
        return trainer.manager.current_step(), trainer.manager.starting_state.starts

    assert World(tmp_path, min_replicas=2).run(story, story) == [(42, False)] * 2


def test_a_group_that_comes_with_other_weights_leaves_those_that_train_alone(
    tmp_path: Path,
) -> None:
    def trains(group: Group) -> int:
        trainer = Trainer(group, seed=1).ddp()
        assert trainer.step()
        group.world.happen(f"trained {group.number}")
        group.world.wait("refused")
        while not trainer.step():
            pass
        return trainer.manager.current_step()

    def comes(group: Group) -> str:
        group.world.wait("trained 0")
        group.world.wait("trained 1")
        trainer = Trainer(group, seed=2).ddp()
        trainer.manager.load_state_dict({**SAVED, "step": 41})
        group.world.happen("refused")  # they ask again from now on
        return refusal(trainer.step)

    world = World(tmp_path, min_replicas=2, join_timeout_ms=2000)
    *steps, said = world.run(trains, trains, comes)
    assert steps == [42, 42]
    assert "group_2" in said and "starts at step 41 from other state than group_" in said


@pytest.mark.parametrize("local", ["DiLoCo", "LocalSGD"])
def test_other_weights_of_the_last_round_are_refused(tmp_path: Path, local: str) -> None:
    def story(group: Group) -> str:
        one = Trainer(group, seed=group.number, use_async_quorum=False)
        if local == "LocalSGD":
            front: Any = LocalSGD(one.manager, one.model, one.inner, 2)
        else:
            outer = torch.optim.SGD(one.model.parameters(), lr=0.7)
            front = DiLoCo(one.manager, [one.model], one.inner, outer, 2)
        return refusal(front.__enter__)

    for said in World(tmp_path, min_replicas=2).run(story, story):
        assert "original_parameters']['0.bias'] is" in said


def test_local_weights_without_a_backup_may_differ(tmp_path: Path) -> None:
    def story(group: Group) -> list[float]:
        one = Trainer(group, seed=group.number, use_async_quorum=False)
        with LocalSGD(one.manager, one.model, one.inner, 1, backup=False):
            one.model(torch.randn(3, 2)).sum().backward()
            one.inner.step()
        return [float(p.sum()) for p in one.model.parameters()]

    first, second = World(tmp_path, min_replicas=2).run(story, story)
    assert first == second


def test_each_rank_compares_its_own_part(tmp_path: Path) -> None:
    """As of a sharded model: only the second ranks of the groups have other weights."""

    def story(group: Group) -> str:
        trainer = Trainer(group, seed=10 * group.rank + group.rank * group.number).ddp()
        if group.rank:
            return refusal(trainer.optimizer.zero_grad)
        trainer.optimizer.zero_grad()
        return str(trainer.manager.num_participants())

    first, second, *others = World(tmp_path, min_replicas=2).run(story, story, ranks=2)
    assert [first, others[0]] == ["2", "2"]
    assert all("0.bias is" in said for said in (second, others[1]))
