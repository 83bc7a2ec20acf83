"""Gradients are averaged among real groups while what is trained, used or called changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from world import Group, World

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.errors import MismatchError
from torchft.optim import OptimizerWrapper

DOORS = [DistributedDataParallel, PureDistributedDataParallel]
STEPS = 6
SMALL = {"bucket_cap_mb": 1e-5}


class Trainee:
    """A group that trains two layers."""

    def __init__(
        self, group: Group, door: Callable[..., Any], *, frozen: bool = False, **options: Any
    ) -> None:
        self.group = group
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.model[0].requires_grad_(not frozen)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        inner = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        self.manager = group.manager(
            state_dict=lambda: {"model": self.model.state_dict(), "inner": inner.state_dict()},
            load_state_dict=self._load,
        )
        self.inner = inner
        self.wrapped = door(self.manager, self.model, **options)
        self.optimizer = OptimizerWrapper(self.manager, inner)

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["inner"])

    @property
    def step(self) -> int:
        return self.manager.current_step()

    def loss(self) -> Tensor:
        return (self.wrapped(torch.full((2, 2), self.group.number + 1.0)) - 1).pow(2).mean()

    def train(self) -> bool:
        self.optimizer.zero_grad()
        self.loss().backward()
        return self.optimizer.step()

    def together(self) -> Trainee:
        """Once both groups are there, so that neither goes ahead."""
        self.group.world.happen(f"{self.group.name} is up")
        for name in ("group_0", "group_1"):
            self.group.world.wait(f"{name} is up")
        return self

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def unfreeze(self) -> None:
        if not self.model[0].weight.requires_grad:
            self.model[0].requires_grad_(True)
            self.optimizer.add_param_group({"params": list(self.model[0].parameters())})


@pytest.mark.parametrize("door", DOORS)
def test_a_layer_that_both_groups_unfreeze_is_averaged(
    tmp_path: Path, door: Callable[..., Any]
) -> None:
    def story(group: Group) -> tuple[list[Tensor], list[bool]]:
        one, went = Trainee(group, door, frozen=True).together(), []
        first = one.model[0].weight.detach().clone()
        while one.step < STEPS:
            if one.step == 3:
                one.unfreeze()
            went.append(one.train())
        assert not torch.equal(first, one.model[0].weight)
        return one.weights, went

    (one, went), (two, _) = World(tmp_path, min_replicas=2).run(story, story)
    assert_close(one, two, rtol=0, atol=0)
    assert went == [True] * STEPS


@pytest.mark.parametrize("door", DOORS)
def test_a_layer_that_one_group_unfreezes_ends_it_with_the_parameters_name(
    tmp_path: Path, door: Callable[..., Any]
) -> None:
    def right(group: Group) -> int:
        one = Trainee(group, door, frozen=True).together()
        while one.step < STEPS:
            one.train()
        return one.step

    def wrong(group: Group) -> str:
        one = Trainee(group, door, frozen=True).together()
        while one.step < 3:
            one.train()
        one.unfreeze()
        with pytest.raises(MismatchError) as error:
            one.train()
        one.manager.shutdown()
        return str(error.value)

    steps, said = World(tmp_path).run(right, wrong)
    assert steps == STEPS
    assert "parameters: 0.bias is [3] float32 here and [3] float32, frozen there" in said


def test_groups_with_other_buckets_are_told_before_any_is_averaged(tmp_path: Path) -> None:
    def story(group: Group) -> str:
        one = Trainee(group, DistributedDataParallel, bucket_cap_mb=1 + group.number)
        try:
            one.train()
            return str(one.manager.errored())
        except MismatchError as error:
            return str(error)

    for said in World(tmp_path, min_replicas=2).run(story, story):
        assert "bucket_cap_mb is" in said


@pytest.mark.parametrize("options", [SMALL, {**SMALL, "static_graph": True}], ids=["", "static"])
def test_a_joiner_has_the_buckets_of_those_that_kept_running(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    def old(group: Group) -> list[Tensor]:
        one = Trainee(group, DistributedDataParallel, **options)
        while one.step < 3:
            one.train()
        group.world.happen("three steps")
        group.world.wait("joined")
        return ends(one)

    def new(group: Group) -> list[Tensor]:
        group.world.wait("three steps")
        one = Trainee(group, DistributedDataParallel, **options)
        group.world.happen("joined")
        return ends(one)

    def ends(one: Trainee) -> list[Tensor]:
        met = 0
        while met < 3:
            committed = one.train()
            met += committed and one.manager.num_participants() == 2
        return one.weights

    one, two = World(tmp_path, min_replicas=1, join_timeout_ms=200).run(old, new)
    assert_close(one, two, rtol=0, atol=0)


def test_a_new_group_heals_before_a_forward_pass_that_comes_before_zero_grad(
    tmp_path: Path,
) -> None:
    def story(group: Group) -> list[Tensor]:
        torch.manual_seed(group.number)
        one = Trainee(group, DistributedDataParallel).together()
        while one.step < 3:
            loss = one.loss()
            one.optimizer.zero_grad()
            loss.backward()
            assert one.optimizer.step()
        return one.weights

    one, two = World(tmp_path, min_replicas=2).run(story, story)
    assert_close(one, two, rtol=0, atol=0)


def test_a_group_that_throws_a_gradient_away_heals_from_those_that_applied_it(
    tmp_path: Path,
) -> None:
    """`continue` between backward and step: the others have its share of their average."""

    def story(group: Group) -> list[Tensor]:
        one = Trainee(group, DistributedDataParallel).together()
        thrown = group.number == 0
        while one.step < STEPS:
            one.optimizer.zero_grad()
            one.loss().backward()
            if thrown and one.step == 2:
                thrown = False
                continue
            one.optimizer.step()
        return one.weights

    one, two = World(tmp_path, min_replicas=2).run(story, story)
    assert_close(one, two, rtol=0, atol=0)
