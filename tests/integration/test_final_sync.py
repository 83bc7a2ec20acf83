"""The last meeting of a run: who is behind heals in it, and ends where the others do."""

from __future__ import annotations

import json
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import Tiny, backward
from helpers.waiting import until
from steps import all_are_in, step
from world import Group, World

from torchft.digest import digest
from torchft.replicated import Replicated
from torchft.strategies import DiLoCoStrategy, OptimSpec, SimpleReduceStrategy

END = 30
SGD = OptimSpec(torch.optim.SGD, lr=0.1)
STRATEGIES = {
    "all-reduce": lambda: SimpleReduceStrategy(SGD),
    "DiLoCo": lambda: DiLoCoStrategy(SGD, H=4),
}


def test_a_group_that_missed_the_last_step_heals_when_the_others_end(tmp_path: Path) -> None:
    def finishes(group: Group) -> Any:
        manager = group.manager()
        all_are_in(manager, 2)
        group.w.fill_(7.0)
        # The other one was left behind: as if the last collective had failed for it alone.
        manager.load_state_dict({"step": 100_000, "batches_committed": 100_000})
        return manager.final_sync(), manager.current_step(), group.w[0].item()

    def is_behind(group: Group) -> Any:
        manager = group.manager(use_async_quorum=True)
        all_are_in(manager, 2)
        committed, mean = step(manager, 5.0)
        assert (committed, mean) == (False, 5.0)  # nothing is averaged any more
        return manager.final_sync(), manager.current_step(), group.w[0].item()

    one, two = World(tmp_path).run(finishes, is_behind)
    assert one == two == (True, 100_000, 7.0)


def test_a_final_sync_alone_says_that_nobody_came(tmp_path: Path) -> None:
    def story(group: Group) -> bool:
        manager = group.manager()
        return manager.final_sync(timeout=timedelta(seconds=1))

    assert World(tmp_path, min_replicas=2).run(story) == [False]


class Trainer:
    """A group that trains by a strategy until step END."""

    def __init__(self, group: Group, name: str) -> None:
        self.model, self.number = Tiny(group.number), group.number
        self.manager = group.manager(state_dict=None, load_state_dict=None)
        self.replicated = Replicated(self.manager, self.model, None, STRATEGIES[name]())

    def until(self, end: int) -> None:
        while self.replicated.step_count < end:
            self.replicated.zero_grad()
            backward(self.model, self.number, self.replicated.step_count + 1)
            self.replicated.step()

    def go_ahead(self) -> None:
        """As if this group had trained to the end with others, which the last one missed."""
        self.manager.load_state_dict({"step": 100_000, "batches_committed": 100_000})
        self.replicated.strategy.clock.steps = END

    def ends(self) -> tuple[bool, int, str]:
        """Whether the others came, where it ended, and a digest of what all share there."""
        came = self.replicated.finish()
        shared = [self.replicated.shared_state_dict(), self.replicated.equal_state()]
        return came, self.replicated.step_count, digest(shared)


@pytest.mark.parametrize("name", STRATEGIES)
def test_who_heals_in_the_final_sync_of_the_others_ends_at_their_step(
    tmp_path: Path, name: str
) -> None:
    def ahead(group: Group) -> Any:
        trainer = Trainer(group, name)
        trainer.until(5)
        trainer.go_ahead()
        return trainer.ends()

    def behind(group: Group) -> Any:
        trainer = Trainer(group, name)
        trainer.until(END)
        return trainer.ends()

    one, two = World(tmp_path, min_replicas=2).run(ahead, behind)
    assert one == two
    assert one[:2] == (True, END)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_new_group_that_comes_to_the_final_sync_of_the_others_ends_with_them(
    tmp_path: Path, name: str
) -> None:
    def ahead(group: Group) -> Any:
        trainer = Trainer(group, name)
        trainer.until(5)
        trainer.go_ahead()
        group.world.happen(f"ahead {group.number}")
        address = group.world.wait("lighthouse")
        until(lambda: "group_2" in those_who_ask(address), "the new group asks")
        return trainer.ends()

    def comes(group: Group) -> Any:
        for number in range(2):
            group.world.wait(f"ahead {number}")
        trainer = Trainer(group, name)
        trainer.until(END)
        return trainer.ends()

    one, two, new = World(tmp_path, min_replicas=2).run(ahead, ahead, comes)
    assert one == two == new
    assert one[:2] == (True, END)


def those_who_ask(lighthouse: str) -> list[str]:
    """The groups that wait for a quorum."""
    with urllib.request.urlopen(f"{lighthouse}/status.json", timeout=10) as reply:
        replicas = json.load(reply)["replicas"]
    asking = [one["replica_id"] for one in replicas if one["asks_at_step"] is not None]
    return [replica_id.split(":")[0] for replica_id in asking]
