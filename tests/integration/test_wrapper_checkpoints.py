"""LocalSGD and DiLoCo go on from a checkpoint in the middle of a cycle, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import Tiny, backward
from world import Group, World

from torchft.digest import digest
from torchft.errors import PhaseError
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager

# torch loads its compiler when a process makes its first optimizer: once, before the groups fork.
torch.optim.SGD([torch.zeros(1)], lr=0.1)

SAVED, END = 7, 14


def diloco(manager: Manager, model: Tiny, inner: torch.optim.Optimizer, **options: Any) -> DiLoCo:
    trained = [p for p in model.parameters() if p.requires_grad]
    outer = torch.optim.SGD(trained, lr=0.7, momentum=0.9, nesterov=True)
    return DiLoCo(manager, [model], inner, outer, 5, **options)


def fed_back(manager: Manager, model: Tiny, inner: torch.optim.Optimizer) -> DiLoCo:
    return diloco(manager, model, inner, fragments=2, should_quantize="int4", error_feedback=True)


def restored(manager: Manager, model: Tiny, inner: torch.optim.Optimizer) -> DiLoCo:
    return diloco(manager, model, inner, deterministic=True, inner_state="restored")


def local_sgd(manager: Manager, model: Tiny, inner: torch.optim.Optimizer) -> LocalSGD:
    return LocalSGD(manager, model, inner, 5, deterministic=True)


def half(manager: Manager, model: Tiny, inner: torch.optim.Optimizer) -> DiLoCo:
    model.bfloat16()
    model.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
    return diloco(manager, model, inner, fragments=2, deterministic=True)


class Run:
    """A group, and all that a checkpoint of it has."""

    def __init__(self, group: Group, door: Callable[..., Any]) -> None:
        self.group, self.model = group, Tiny(seed=group.number)
        self.inner = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=0.01
        )
        self.manager = group.manager(
            use_async_quorum=False, min_replica_size=2, load_state_dict=None, state_dict=None
        )
        self.door = door(self.manager, self.model, self.inner)
        self.parts = {
            "model": self.model,
            "inner": self.inner,
            "manager": self.manager,
            "door": self.door,
        }

    def train(self, first: int, last: int) -> None:
        with self.door:
            self.steps(first, last)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.inner.zero_grad()
            backward(self.model, self.group.number, step)
            self.inner.step()

    def save(self, path: Path) -> None:
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])

    def everything(self) -> str:
        return digest({name: part.state_dict() for name, part in self.parts.items()})


@pytest.mark.parametrize("door", [fed_back, restored, local_sgd, half])
def test_a_job_that_goes_on_from_its_checkpoints_ends_with_the_same_bits(
    tmp_path: Path, door: Callable[..., Any]
) -> None:
    def saves(group: Group) -> str:
        run = Run(group, door)
        run.train(1, SAVED)
        run.save(tmp_path / group.name)
        run.train(SAVED + 1, END)
        return run.everything()

    def goes_on(group: Group) -> str:
        run = Run(group, door)
        run.load(tmp_path / group.name)
        run.train(SAVED + 1, END)
        return run.everything()

    found = []
    for name, story in ("first", saves), ("second", goes_on):
        folder = tmp_path / f"{name} job"
        folder.mkdir()
        found.append(World(folder, min_replicas=2).run(story, story))
    assert found[0] == found[1]


def test_a_checkpoint_comes_too_late_when_training_has_begun(tmp_path: Path) -> None:
    def story(group: Group) -> None:
        run = Run(group, restored)
        with run.door, pytest.raises(PhaseError, match="before entering"):
            run.door.load_state_dict(run.door.state_dict())

    World(tmp_path, min_replicas=2).run(story, story)


def test_no_checkpoint_is_taken_while_a_round_is_in_flight(tmp_path: Path) -> None:
    def delayed(*args: Any) -> DiLoCo:
        return diloco(*args, fragment_sync_delay=2)

    def story(group: Group) -> bool:
        run = Run(group, delayed)
        with run.door:
            run.steps(1, 3)
            with pytest.raises(PhaseError, match="in flight"):
                run.door.state_dict()
        return bool(run.door.state_dict())

    assert World(tmp_path, min_replicas=2).run(story, story) == [True, True]
