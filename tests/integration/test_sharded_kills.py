"""Sharded models under kills and heals at random moments: all that heals is equal at each step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from campaign import Campaign, Report, plan
from sharded import net, shard
from torch.optim.lr_scheduler import ExponentialLR
from world import Group

from torchft.ddp import DistributedDataParallel
from torchft.optim import OptimizerWrapper

SEED = int(os.environ.get("SEED", "13"))


class Position:
    """Of a loader that goes on with each batch that is asked of it."""

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def train(group: Group) -> Iterator[Report]:
    """Batches of each rank follow from position and shared random numbers."""
    torch.manual_seed(os.getpid())  # of its own until it heals
    model, position = shard(group, net()), Position()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = ExponentialLR(adamw, gamma=0.999)
    manager = group.manager(load_state_dict=None, state_dict=None, use_async_quorum=False)
    manager.register(
        model=model,
        optimizer=adamw,
        schedule=schedule,
        position=position,
        random=torch.default_generator,
    )
    ddp, optimizer = DistributedDataParallel(manager, model), OptimizerWrapper(manager, adamw)
    while True:
        optimizer.zero_grad()
        position.at += 1
        batch = torch.rand(4, 3) + 0.01 * (position.at % 10) * (2 * group.number + group.rank)
        ddp(batch).square().sum().backward()
        if optimizer.step():
            schedule.step()
            digest = manager.registered.digest_shared()
            yield Report(manager.current_step(), manager.num_participants(), digest)


def _campaign(folder: Path, kills: int) -> None:
    print(f"seed {SEED}: SEED={SEED} repeats its plan")
    campaign = Campaign(folder, train)
    campaign.run(plan(SEED, kills))
    print(f"{campaign.compared} states compared")


def test_three_kills_and_heals_leave_all_state_equal(tmp_path: Path) -> None:
    _campaign(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_kills_and_heals_leave_all_state_equal(tmp_path: Path) -> None:
    _campaign(tmp_path, 100)
