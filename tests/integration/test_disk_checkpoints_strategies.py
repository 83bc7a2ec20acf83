"""Checkpoints of LocalSGD, DiLoCo and `Replicated`: where all groups go on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.tiny import Tiny, backward
from world import Group, World

from torchft.checkpointing.disk import DiskCheckpoints
from torchft.digest import digest
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.replicated import Replicated
from torchft.strategies import (
    LocalSGDStrategy,
    OptimSpec,
    SimpleReduceStrategy,
    StreamingDiLoCoStrategy,
)

# torch loads its compiler when a process makes its first optimizer: once, before the groups fork.
torch.optim.SGD([torch.zeros(1)], lr=0.1)

SAVED, END = 4, 8
"""Rounds at the checkpoint, and in all."""
SGD = OptimSpec(torch.optim.SGD, lr=0.1)

Make = Callable[..., Any]


def local_sgd(*parts: Any) -> LocalSGD:
    return LocalSGD(*parts, 3, deterministic=True)


def diloco(manager: Any, model: Tiny, inner: Any, **options: Any) -> DiLoCo:
    trained = [p for p in model.parameters() if p.requires_grad]
    outer = torch.optim.SGD(trained, lr=0.7, momentum=0.9, nesterov=True)
    options = {"sync_every": 3, "deterministic": True, **options}
    return DiLoCo(manager, [model], inner, outer, **options)


def streaming(*parts: Any) -> DiLoCo:
    """Two or three rounds are open at a time: one opens every second step."""
    return diloco(*parts, sync_every=6, fragments=3, fragment_sync_delay=5)


def all_reduce(manager: Any, model: Tiny, inner: Any) -> Replicated:
    return Replicated(manager, model, None, SimpleReduceStrategy(SGD), deterministic=True)


def replicated(manager: Any, model: Tiny, inner: Any) -> Replicated:
    return Replicated(manager, model, None, LocalSGDStrategy(SGD, H=3), deterministic=True)


def replicated_streaming(manager: Any, model: Tiny, inner: Any) -> Replicated:
    strategy = StreamingDiLoCoStrategy(SGD, H=6, fragments=3, delay=5)
    return Replicated(manager, model, None, strategy, deterministic=True)


class Stand(NamedTuple):
    """Where a group is."""

    round: int
    data: int
    shared: str
    """Digest of what all groups have in common."""
    weights: str
    in_flight: bool


class Run:
    """A group that trains by `make`, on data that follow from its number and the inner step."""

    def __init__(
        self, group: Group, folder: Path, make: Make, *, first: bool = False, **options: Any
    ) -> None:
        self.group, self.model, self.at = group, Tiny(seed=group.number), 0
        inner = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        self.inner = inner
        self.manager = group.manager(load_state_dict=None, state_dict=None, **options)
        if first:  # what is registered first is loaded first
            self.manager.register(model=self.model, optimizer=inner, data=self)
        self.front = make(self.manager, self.model, inner)
        if not first:
            self.manager.register(model=self.model, optimizer=inner, data=self)
        self.checkpoints = DiskCheckpoints(self.manager, folder, SAVED, keep=9)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def step(self) -> None:
        called = self.front if type(self.front) is Replicated else self.inner
        called.zero_grad()
        self.at += 1
        backward(self.model, self.group.number, self.at)
        called.step()
        if self.checkpoints.save_if_due():
            self.checkpoints.close()

    def until(self, rounds: int) -> Stand:
        if type(self.front) is not Replicated and not self.front._inside:
            self.front.__enter__()
        while self.manager.current_step() < rounds:
            self.step()
        return self.stand()

    def stand(self) -> Stand:
        shared = self.front.shared_state_dict()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        open_rounds = self.front.strategy.in_flight
        at = self.manager.current_step(), self.at
        return Stand(*at, digest(shared), digest(trained), open_rounds)


def job(folder: Path, name: str, groups: int, story: Callable[[Group], Any]) -> list[Any]:
    (folder / name).mkdir()
    return World(folder / name, min_replicas=groups).run(*[story] * groups)


def uninterrupted(tmp_path: Path, make: Make) -> list[list[Stand]]:
    """Where each of two groups stands at the checkpoint, and at the end."""

    def story(group: Group) -> list[Stand]:
        run = Run(group, tmp_path / "checkpoints", make)
        return [run.until(SAVED), run.until(END)]

    return job(tmp_path, "first", 2, story)


def restarted(tmp_path: Path, make: Make, groups: int, **options: Any) -> list[list[Stand]]:
    """Where each group stands when it has loaded, and at the end."""

    def story(group: Group) -> list[Stand]:
        run = Run(group, tmp_path / "checkpoints", make, **options)
        assert run.checkpoints.load_newest() == SAVED
        return [run.stand(), run.until(END)]

    (tmp_path / "checkpoints" / f"step-{END:010d}").rename(tmp_path / "the end")
    return job(tmp_path, "second", groups, story)


@pytest.mark.parametrize(
    "make, options",
    [
        (local_sgd, {"first": True}),
        (diloco, {}),
        (diloco, {"init_sync": False}),
        (all_reduce, {}),
        (replicated, {}),
    ],
)
def test_two_groups_end_as_if_they_had_never_stopped(
    tmp_path: Path, make: Make, options: dict[str, Any]
) -> None:
    never_stopped = uninterrupted(tmp_path, make)
    assert restarted(tmp_path, make, 2, **options) == never_stopped


@pytest.mark.parametrize(
    "make, groups, first",
    [
        (diloco, 3, False),
        (streaming, 1, False),
        (streaming, 3, True),
        (replicated_streaming, 3, False),
    ],
)
def test_another_number_of_groups_goes_on_from_the_same_state(
    tmp_path: Path, make: Make, groups: int, first: bool
) -> None:
    saved = uninterrupted(tmp_path, make)[0][0]
    ends = restarted(tmp_path, make, groups, first=first)
    assert [start[:3] for start, _ in ends] == [saved[:3]] * groups
    assert saved.in_flight == (make is not diloco)
    assert len({(end.round, end.data, end.shared) for _, end in ends}) == 1


def test_with_a_delay_what_each_group_did_alone_since_its_last_rounds_is_lost(
    tmp_path: Path,
) -> None:
    saved = [start for start, _ in uninterrupted(tmp_path, streaming)]
    starts = [start for start, _ in restarted(tmp_path, streaming, 2)]
    assert {one.shared for one in starts} == {one.shared for one in saved}
    assert len({one.weights for one in saved}) == 2, "each has gone its own way"
    assert len({one.weights for one in starts}) == 1, "all start from the last averages"
