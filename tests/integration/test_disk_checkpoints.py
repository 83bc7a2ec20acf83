"""Checkpoints on disk: one group writes, any number of groups starts from the newest whole one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from world import Group, World

from torchft.checkpointing import kept
from torchft.checkpointing.disk import DiskCheckpoints
from torchft.checkpointing.folder import CheckpointFolder
from torchft.ddp import DistributedDataParallel
from torchft.errors import PhaseError, StateDictError
from torchft.optim import OptimizerWrapper

# torch loads its compiler when a process makes its first optimizer: once, before the groups fork.
torch.optim.SGD([torch.zeros(1)], lr=0.1)

EVERY = 5


class Data:
    """Batches by position, as a stateful loader has it."""

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def batch(self) -> torch.Tensor:
        self.at += 1
        return torch.linspace(-1, 1, 6).view(2, 3) * self.at


class Trainer:
    """A data-parallel loop that writes checkpoints into `folder`."""

    def __init__(self, group: Group, folder: Path, *, keep: int = 2, **options: Any) -> None:
        torch.manual_seed(group.number)
        self.model = nn.Linear(3, 2)
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.data, self.position = Data(), Data()
        self.manager = group.manager(
            load_state_dict=None, state_dict=None, use_async_quorum=False, **options
        )
        self.manager.register(model=self.model, optimizer=self.inner, data=self.data)
        self.wrapped = DistributedDataParallel(self.manager, self.model)
        self.optimizer = OptimizerWrapper(self.manager, self.inner)
        self.checkpoints = DiskCheckpoints(
            self.manager, folder, EVERY, keep, state={"position": self.position}
        )

    def step(self) -> None:
        self.position.at += 1
        self.optimizer.zero_grad()
        self.wrapped(self.data.batch()).square().mean().backward()
        assert self.optimizer.step()
        if self.checkpoints.save_if_due():
            self.checkpoints.close()  # steps are quicker than a disk

    def until(self, step: int) -> str:
        while self.manager.current_step() < step:
            self.step()
        self.checkpoints.close()
        return self.manager.registered.digest_shared()


def steps_in(folder: Path) -> list[int]:
    return [one.step for one in kept.newest_first(CheckpointFolder(folder).found()) if one.whole]


def run(tmp_path: Path, name: str, *stories: Callable[[Group], Any], **options: Any) -> list[Any]:
    """One job after the other on the same folder of checkpoints."""
    (tmp_path / name).mkdir()
    return World(tmp_path / name, **options).run(*stories)


def test_three_groups_start_where_two_ended(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def saves(group: Group) -> tuple[str, int | None]:
        trainer = Trainer(group, folder)
        assert trainer.checkpoints.load_newest() is None
        return trainer.until(10), trainer.checkpoints.newest

    def goes_on(group: Group) -> tuple[Any, ...]:
        trainer = Trainer(group, folder)
        loaded = trainer.checkpoints.load_newest()
        same = trainer.manager.registered.digest_shared()
        at = trainer.data.at, trainer.position.at, trainer.manager.batches_committed()
        return loaded, same, at, trainer.until(12)

    (digest, newest), (other, written) = run(tmp_path, "first", saves, saves, min_replicas=2)
    assert digest == other
    assert (newest, written) in {(10, None), (None, 10)}  # one of them writes
    assert steps_in(folder) == [10, 5]
    ends = run(tmp_path, "second", goes_on, goes_on, goes_on, min_replicas=3)
    assert [end[:3] for end in ends] == [(10, digest, (10, 10, 20))] * 3
    assert len({end[3] for end in ends}) == 1


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run(tmp_path, "job", lambda group: Trainer(group, tmp_path / "checkpoints").until(21))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-0000000015",
        "step-0000000020",
    ]


def spoil(folder: Path, step: int) -> None:
    """Change one byte in the middle of the tensors."""
    path = max((folder / kept.name_of(step)).glob("*.distcp"), key=lambda one: one.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_one_is_named_and_the_one_before_it_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    run(tmp_path, "first", lambda group: Trainer(group, folder).until(10))
    spoil(folder, 10)

    def goes_on(group: Group) -> tuple[Any, ...]:
        with caplog.at_level(logging.WARNING):
            loaded = Trainer(group, folder).checkpoints.load_newest()
        return loaded, [one.getMessage() for one in caplog.records]

    (loaded, said), *_ = run(tmp_path, "second", goes_on)
    assert loaded == 5 and len(said) == 1
    assert "step-0000000010 is damaged" in said[0] and "another SHA-256" in said[0]


def test_a_group_that_sees_no_checkpoint_heals_from_one_that_does(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run(tmp_path, "first", lambda group: Trainer(group, folder).until(10))

    def goes_on(group: Group) -> tuple[Any, ...]:
        trainer = Trainer(group, folder if group.number == 0 else tmp_path / "empty")
        return trainer.checkpoints.load_newest(), trainer.until(12)

    (loaded, digest), (nothing, other) = run(tmp_path, "second", goes_on, goes_on, min_replicas=2)
    assert (loaded, nothing) == (10, None)
    assert digest == other


def test_a_run_that_begins_anew_does_not_mix_with_older_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run(tmp_path, "first", lambda group: Trainer(group, folder).until(10))

    def begins_anew(group: Group) -> None:
        with pytest.raises(PhaseError, match="of step 10, and this run is at 1: call load_newest"):
            Trainer(group, folder).step()

    run(tmp_path, "second", begins_anew)


def test_a_checkpoint_is_loaded_before_the_first_step(tmp_path: Path) -> None:
    def story(group: Group) -> None:
        trainer = Trainer(group, tmp_path / "checkpoints")
        trainer.until(5)
        with pytest.raises(PhaseError, match="training has begun"):
            trainer.checkpoints.load_newest()

    run(tmp_path, "job", story)


def test_a_checkpoint_is_not_saved_in_the_middle_of_a_step(tmp_path: Path) -> None:
    def story(group: Group) -> None:
        trainer = Trainer(group, tmp_path / "checkpoints")
        trainer.optimizer.zero_grad()
        trainer.wrapped(trainer.data.batch()).sum().backward()
        with pytest.raises(PhaseError, match="a step is open"):
            trainer.checkpoints.save_if_due()

    run(tmp_path, "job", story)


def test_what_is_registered_must_be_what_was_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run(tmp_path, "first", lambda group: Trainer(group, folder).until(5))

    def registers_less(group: Group) -> None:
        manager = group.manager()
        checkpoints = DiskCheckpoints(manager, folder, EVERY, state={"position": Data()})
        with pytest.raises(
            StateDictError, match=r"has state .'data', 'model', 'optimizer'., which"
        ):
            checkpoints.load_newest()

    def gives_none(group: Group) -> None:
        with pytest.raises(StateDictError, match=r"with state=\['position'\], and here it is \[\]"):
            DiskCheckpoints(group.manager(), folder, EVERY).load_newest()

    run(tmp_path, "less", registers_less)
    run(tmp_path, "none", gives_none)
