"""Sharded state is read by the thread that trains, never within a pass, also in the background."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from sharded import RANKS, Sharded
from torch import nn
from torch.distributed.fsdp import FSDPModule
from world import KILLED, Group, World

from torchft.ddp import DistributedDataParallel
from torchft.manager import Manager
from torchft.sharded import gradient_part


class Watched(Sharded):
    """Quorums form beside its forward pass. It notes where its state is read."""

    def __init__(self, group: Group, **options: Any) -> None:
        self.now, self.reads = "elsewhere", set[tuple[str, str]]()
        super().__init__(group, asynchronous=True, **options)

    def state_dict(self) -> dict[str, Any]:
        self.reads.add((threading.current_thread().name, self.now))
        return super().state_dict()

    def backward(self) -> None:
        self.now = "in a pass"
        super().backward()
        self.now = "elsewhere"
        if self.wrapped is self.model:
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                self.manager.allreduce(gradient_part(parameter)).wait()


def averages_later(manager: Manager, model: nn.Module) -> nn.Module:
    return model


def averages_in_hooks(manager: Manager, model: nn.Module) -> Any:
    """As torchtitan does: within the backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(lambda grad: manager.allreduce(grad).wait())
    return lambda batch: model(batch)


@pytest.mark.parametrize(
    ("transport", "wrap"),
    [
        ("http", averages_later),
        ("http", DistributedDataParallel),
        ("process group", averages_in_hooks),
    ],
)
def test_a_donor_reads_its_shards_on_the_thread_that_trains(
    tmp_path: Path, transport: str, wrap: Any
) -> None:
    """One group is killed and another comes."""

    def make(group: Group) -> Watched:
        return Watched(group, transport=transport, wrap=wrap)

    def end(one: Watched) -> Any:
        ended = one.until(16)
        assert one.reads == {("MainThread", "elsewhere")}
        return ended

    def stays(group: Group) -> Any:
        one = make(group)
        one.until(2)
        for event, participants in ("trained", 2), ("joined", 1), ("alone", 2):
            group.world.happen(f"{event} {group.rank}")
            while one.manager.num_participants() != participants:
                one.step()
        return end(one)

    def dies(group: Group) -> Any:
        for rank in range(RANKS):
            group.world.wait(f"trained {rank}")
        one = make(group)
        for rank in range(RANKS):
            while not group.world.happened(f"joined {rank}"):
                one.step()
        group.dies()

    def comes(group: Group) -> Any:
        for rank in range(RANKS):
            group.world.wait(f"alone {rank}")
        return end(make(group))

    ends = World(tmp_path).run(stays, dies, comes, ranks=RANKS)
    assert ends[:RANKS] == ends[2 * RANKS :]
    assert ends[RANKS : 2 * RANKS] == [KILLED, KILLED]
