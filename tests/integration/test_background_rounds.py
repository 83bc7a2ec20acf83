"""DiLoCo whose rounds form in the background: nobody waits before an average is due."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coordination import Child
from helpers.tiny import Tiny, backward
from world import KILLED, Group, World

from torchft.checkpointing import HTTPTransport
from torchft.digest import digest
from torchft.errors import HealError
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager

# torch loads its compiler when a process makes its first optimizer: once, before the groups fork.
torch.optim.SGD([torch.zeros(1)], lr=0.1)

EVERY, FRAGMENTS = 6, 3
SEVERAL = 5
"""A delay with which two or three rounds are open at a time: one opens every second step."""


class Training:
    """A group in a round every second inner step."""

    def __init__(
        self, group: Group, *, delay: int = SEVERAL, asynchronous: bool = True, **options: Any
    ) -> None:
        self.group, self.model, self.steps = group, Tiny(seed=group.number), 0
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.inner = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        manager = {"min_replica_size": 1, "load_state_dict": lambda _: None, "state_dict": dict}
        manager |= {name: options.pop(name) for name in list(options) if name in MANAGERS}
        self.manager: Manager = group.manager(use_async_quorum=asynchronous, **manager)
        self.door = DiLoCo(
            self.manager,
            [self.model],
            self.inner,
            torch.optim.SGD(trained, lr=0.7, momentum=0.9, nesterov=True),
            EVERY,
            fragments=FRAGMENTS,
            fragment_sync_delay=delay,
            deterministic=not options.get("should_quantize"),
            **options,
        )

    def step(self) -> None:
        self.steps += 1
        self.inner.zero_grad()
        backward(self.model, self.group.number, self.steps)
        self.inner.step()

    def train_until(self, rounds: int) -> None:
        while self.manager.current_step() < rounds:
            self.step()

    @property
    def shared(self) -> str:
        """The digest of what all groups have in common."""
        return digest(self.door.shared_state_dict())

    def result(self) -> tuple[int, str]:
        return self.manager.current_step(), self.shared


MANAGERS = "load_state_dict", "max_retries", "min_replica_size", "quorum_timeout", "state_dict"


@pytest.mark.parametrize("codec", [False, "int8"], ids=["fp32", "int8"])
@pytest.mark.parametrize("buffers", ["left", "averaged"])
def test_forming_in_the_background_changes_no_bit(
    tmp_path: Path, codec: bool | str, buffers: str
) -> None:
    def story(asynchronous: bool) -> Callable[[Group], Any]:
        def trains(group: Group) -> Any:
            one = Training(group, asynchronous=asynchronous, should_quantize=codec, buffers=buffers)
            with one.door:
                for _ in range(20):
                    one.step()
            return one.result()

        return trains

    found = []
    for asynchronous in (True, False):
        folder = tmp_path / str(asynchronous)
        folder.mkdir()
        world = World(folder, min_replicas=3)
        found.append(world.run(*[story(asynchronous)] * 3))
    background, waited = found
    assert background == waited
    assert len(set(background)) == 1
    steps, _ = background[0]
    assert steps == 10


def test_training_goes_on_while_a_group_is_late_for_the_quorum(tmp_path: Path) -> None:
    opens = 2  # after so many inner steps, with a delay of 2, the first round opens

    def early(group: Group) -> Any:
        one = Training(group, delay=2, max_retries=0)
        with one.door:
            for _ in range(opens + 1):
                one.step()
            group.world.happen("a step was taken while nobody else asked for a quorum")
            while one.steps < 12:
                one.step()
        return one.result()

    def late(group: Group) -> Any:
        one = Training(group, delay=2, max_retries=0)
        with one.door:
            while one.steps < 12:
                if one.steps == opens - 1:
                    group.world.wait("a step was taken while nobody else asked for a quorum")
                one.step()
        return one.result()

    one, two = World(tmp_path, min_replicas=2, join_timeout_ms=60_000).run(early, late)
    assert one == two
    assert one[0] == 6


def test_a_group_joins_while_several_averages_travel_and_all_end_equal(tmp_path: Path) -> None:
    def there(group: Group) -> Any:
        one = Training(group, max_retries=0)
        with one.door:
            while one.manager.current_step() < 8:
                one.step()
            group.world.happen(f"{group.name} is in full swing")
            while not group.world.happened("the end is known"):
                one.step()
            one.train_until(int(group.world.wait("the end is known")))
        return one.result()

    def joins(group: Group) -> Any:
        for name in ("group_0", "group_1"):
            group.world.wait(f"{name} is in full swing")
        one = Training(group)
        with one.door:
            end = one.manager.current_step() + 12
            group.world.happen("the end is known", str(end))
            one.train_until(end)
        return one.result()

    one, two, three = World(tmp_path).run(there, there, joins)
    assert one == two == three


@pytest.mark.parametrize(
    "options", [{}, {"should_quantize": "int4", "error_feedback": True}], ids=["fp32", "fed back"]
)
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_a_group_that_fell_behind_heals_and_drops_the_rounds_that_it_had_open(
    tmp_path: Path, options: dict[str, Any], asynchronous: bool
) -> None:
    def story(group: Group) -> Any:
        one = Training(group, asynchronous=asynchronous, min_replica_size=2, **options)
        with one.door:
            for _ in range(9):
                one.step()
            if group.number == 1:  # as if the last rounds had failed for it alone
                one.manager.load_state_dict({"step": 1, "batches_committed": 2})
                torch.nn.init.zeros_(one.model.second[2].weight)
                one.door._recipe.backups[0].flats[0].zero_()
            one.train_until(12)
        return one.result()

    one, two = World(tmp_path, min_replicas=2).run(story, story)
    assert one == two


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_one_rank_of_a_group_cannot_heal_so_none_takes_open_rounds_over(
    tmp_path: Path, asynchronous: bool
) -> None:
    def there(group: Group) -> Any:
        one = Training(group, asynchronous=asynchronous)
        with one.door:
            one.train_until(8)
            group.world.happen(f"{group.name} rank {group.rank} is in full swing")
            while not group.world.happened("the end is known"):
                one.step()
            one.train_until(int(group.world.wait("the end is known")))
        return one.result()

    def joins(group: Group) -> Any:
        for rank in (0, 1):
            group.world.wait(f"group_0 rank {rank} is in full swing")
        tries, loads = [], []
        fetch = HTTPTransport.recv_checkpoint

        def fails_once(transport: HTTPTransport[Any], *where: Any, **how: Any) -> Any:
            tries.append(where)
            if group.rank == 1 and len(tries) == 1:
                raise HealError("the network is down")
            return fetch(transport, *where, **how)

        HTTPTransport.recv_checkpoint = fails_once  # type: ignore[method-assign]
        load = loads.append
        one = Training(group, asynchronous=asynchronous, load_state_dict=load, state_dict=dict)
        with one.door:
            assert len(tries) == 2, "all ranks heal again when one could not"
            assert len(loads) == 2 - group.rank
            if group.rank == 0:
                group.world.happen("the end is known", str(one.manager.current_step() + 12))
            one.train_until(int(group.world.wait("the end is known")))
        return one.result()

    one, other, two, another = World(tmp_path).run(there, joins, ranks=2)
    assert (one, other) == (two, another)


def test_a_member_dies_with_rounds_open_and_the_others_go_on_equal(tmp_path: Path) -> None:
    def survivor(group: Group) -> Any:
        one = Training(group, min_replica_size=1)
        with one.door:
            one.train_until(4)
            while one.manager.num_participants() > 2:
                one.step()
            one.train_until(one.manager.current_step() + 4)
        return one.result()

    def victim(group: Group) -> None:
        one = Training(group, min_replica_size=1)
        with one.door:
            one.train_until(4)
            while len(one.door._strategy._flight) < 2:
                one.step()
            group.dies()

    one, two, killed = World(tmp_path, min_replicas=2).run(survivor, survivor, victim)
    assert killed == KILLED
    assert one == two


def test_no_quorum_is_raised_by_the_inner_step_that_needs_it(tmp_path: Path) -> None:
    def left_alone(group: Group) -> Any:
        one = Training(group, delay=1, quorum_timeout=timedelta(seconds=3))
        with one.door, pytest.raises(TimeoutError, match="no quorum"):
            while True:
                one.step()
        weights = dict(one.model.named_parameters())
        for name, synchronised in one.door.shared_state_dict()["0"]["original_parameters"].items():
            assert torch.equal(weights[name], synchronised.view_as(weights[name]))
        return "raised"

    def leaves(group: Group) -> None:
        one = Training(group, delay=1)
        with one.door:
            one.step()
            group.dies()

    raised, killed = World(tmp_path, min_replicas=2).run(left_alone, leaves)
    assert (raised, killed) == ("raised", KILLED)


def test_a_call_that_never_ends_does_not_hold_the_process() -> None:
    code = (
        "import threading; from torchft.manager.background import Background\n"
        "Background('test').submit(threading.Event().wait)\nprint('end')"
    )
    with Child(code) as child:
        assert child.line() == "end"
        assert child.end() == 0, child.stderr
