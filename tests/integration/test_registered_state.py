"""All that a group registered heals: also learning rate, schedule, scale, RNG and position."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import StepLR
from world import Group, World

from torchft.ddp import DistributedDataParallel
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper

TOGETHER, STEPS = 3, 6


class Data:
    """Batches by position, as a stateful loader has it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def batch(self) -> torch.Tensor:
        self.at += 1
        return torch.linspace(-1, 1, 6).view(2, 3) * self.at


class Trainer:
    """A loop whose every part starts where `wrong` says, in the group that is to heal."""

    def __init__(self, group: Group, *, wrong: bool) -> None:
        self.model = nn.Linear(3, 2)
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.5 if wrong else 0.1)
        self.schedule = StepLR(self.inner, step_size=2, gamma=0.7 if wrong else 0.5)
        self.scaler = GradScaler("cpu", init_scale=4.0 if wrong else 64.0, growth_interval=2)
        self.rng = torch.Generator().manual_seed(9 if wrong else 1)
        self.data, self.mine = Data(50 if wrong else 0), Data(70 if wrong else 0)
        self.manager: Manager = group.manager(load_state_dict=None, state_dict=None)
        self.manager.register(
            own=["mine"],
            model=self.model,
            optimizer=self.inner,
            scheduler=self.schedule,
            scaler=self.scaler,
            rng=self.rng,
            data=self.data,
            mine=self.mine,
        )
        self.wrapped = DistributedDataParallel(self.manager, self.model)
        self.optimizer = OptimizerWrapper(self.manager, self.inner)

    def begin(self) -> None:
        self.optimizer.zero_grad()
        self.manager.wait_quorum()

    def finish_step(self) -> bool:
        noise = torch.rand(2, 3, generator=self.rng)
        self.wrapped(self.data.batch() + noise).square().mean().backward()
        committed = self.optimizer.step()
        self.schedule.step()
        return committed

    def result(self) -> dict[str, Any]:
        return {
            "shared": self.manager.registered.digest_shared(),
            "lr": self.inner.param_groups[0]["lr"],
            "gamma": self.schedule.gamma,
            "epoch": self.schedule.last_epoch,
            "scale": self.scaler.get_scale(),
            "at": self.data.at,
            "drawn": float(torch.rand(1, generator=self.rng)),
            "step": self.manager.current_step(),
        }


def ahead(group: Group) -> dict[str, Any]:
    trainer = Trainer(group, wrong=False)
    for _ in range(TOGETHER):
        trainer.begin()
        assert trainer.finish_step()
    group.world.happen("ahead", trainer.manager.registered.digest_shared())
    group.world.wait("made")
    while trainer.manager.num_participants() < 2:
        trainer.manager.start_quorum(timeout=timedelta(seconds=20))
        trainer.manager.wait_quorum()
    while trainer.manager.current_step() < STEPS:
        trainer.begin()
        assert trainer.finish_step()
    return trainer.result()


def behind(group: Group) -> dict[str, Any]:
    group.world.wait("ahead")
    trainer = Trainer(group, wrong=True)
    assert trainer.manager.registered.digest_shared() != group.world.wait("ahead")
    group.world.happen("made")
    while trainer.manager.current_step() < STEPS:
        trainer.begin()
        assert trainer.finish_step()
    return {**trainer.result(), "mine": trainer.mine.at}


def test_a_group_with_another_learning_rate_schedule_and_position_heals_to_equal_ones(
    tmp_path: Path,
) -> None:
    one, other = World(tmp_path, join_timeout_ms=200).run(ahead, behind)
    assert other.pop("mine") == 70  # its own: no donor's
    assert one == other
    assert (one["step"], one["at"], one["epoch"], one["gamma"]) == (STEPS, STEPS, STEPS, 0.5)
    assert one["scale"] == 64.0
