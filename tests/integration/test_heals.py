"""How a group gets the current state: when it joins, when it fell behind, when the others end."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from steps import BOTH_MODES, all_are_in, step
from world import KILLED, Group, World

from torchft.checkpointing.snapshot import SLICE_BYTES
from torchft.checkpointing.stream import Stream
from torchft.digest import digest
from torchft.errors import HealError
from torchft.managed_peers import ManagedPeers
from torchft.manager import Manager
from torchft.peers import Place


def test_the_first_step_starts_everybody_from_equal_weights(tmp_path: Path) -> None:
    def story(group: Group) -> list[float]:
        group.w.fill_(group.number + 1)
        manager = group.manager(min_replica_size=3)
        committed, mean = step(manager, group.w[0].item())
        assert committed
        return [group.w[0].item(), mean]

    world = World(tmp_path, min_replicas=3)
    weights = world.run(story, story, story)
    assert len({w for w, _ in weights}) == 1


@BOTH_MODES
def test_a_group_that_joins_late_heals_and_is_counted_at_once(
    tmp_path: Path, asynchronous: bool
) -> None:
    def early(group: Group) -> Any:
        manager = group.manager(use_async_quorum=asynchronous)
        group.w.fill_(7.0)
        for _ in range(3):
            assert step(manager, 1.0) == (True, 1.0)
        group.world.happen("three steps")
        while manager.num_participants() < 2:
            step(manager, 1.0)
        return step(manager, 1.0), manager.current_step()

    def late(group: Group) -> Any:
        group.world.wait("three steps")
        manager = group.manager(use_async_quorum=asynchronous)
        committed, mean = step(manager, 3.0)
        assert (committed, mean) == (True, 2.0)
        assert group.w[0].item() == 7.0
        return step(manager, 3.0), manager.current_step()

    world = World(tmp_path)
    one, two = world.run(early, late)
    assert one == two
    assert one[0] == (True, 2.0)


def test_a_heal_that_fails_leaves_the_others_committing(tmp_path: Path) -> None:
    def broken(state: Any) -> None:
        raise RuntimeError("no memory")

    def first(group: Group) -> int:
        manager = group.manager()
        for _ in range(2):
            step(manager, 1.0)
        group.world.happen("running")
        while manager.num_participants() == 1 and not manager.errored():
            step(manager, 1.0)
        group.world.wait("gone")
        while not step(manager, 1.0)[0]:
            pass
        return manager.current_step()

    def second(group: Group) -> tuple[bool, str]:
        group.world.wait("running")
        manager = group.manager(load_state_dict=broken)
        committed, _ = step(manager, 1.0)
        error = manager.errored()
        manager.shutdown()
        group.world.happen("gone")
        assert error is not None
        return committed, str(error.original_exception)

    world = World(tmp_path)
    steps, (committed, error) = world.run(first, second)
    assert steps > 2
    assert not committed
    assert "no memory" in error


def test_a_joiner_takes_part_in_the_others_round_with_zeros(tmp_path: Path) -> None:
    def rounds(group: Group, value: float) -> Any:
        manager = group.manager(use_async_quorum=False)
        peers = ManagedPeers(manager)
        first = peers.open(Place.AFTER)
        if not first.opening:
            (mean,) = first.average([torch.full((1, 1), value)]).wait()
            return mean.item(), first.close(), group.w[0].item(), manager.current_step()
        group.w.fill_(7.0)
        group.world.happen("opened")
        while True:
            round_ = peers.open(Place.AFTER)
            (mean,) = round_.average([torch.full((1, 1), value)]).wait()
            committed = round_.close()
            if len(manager._begun("this").plan.members) == 2:
                return mean.item(), committed, group.w[0].item(), manager.current_step()

    def late(group: Group) -> Any:
        group.world.wait("opened")
        return rounds(group, 9.0)

    world = World(tmp_path)
    one, two = world.run(lambda group: rounds(group, 4.0), late)
    assert one == two
    assert one[:3] == (4.0, True, 7.0)


def test_a_group_that_missed_the_last_step_heals_when_the_others_settle(tmp_path: Path) -> None:
    def finishes(group: Group) -> Any:
        manager = group.manager()
        all_are_in(manager, 2)
        group.w.fill_(7.0)
        # The other one was left behind: as if the last collective had failed for it alone.
        manager.load_state_dict({"step": 100_000, "batches_committed": 100_000})
        return manager.settle(), manager.current_step(), group.w[0].item()

    def is_behind(group: Group) -> Any:
        manager = group.manager(use_async_quorum=True)
        all_are_in(manager, 2)
        committed, mean = step(manager, 5.0)
        assert (committed, mean) == (False, 5.0)  # nothing is averaged any more
        return manager.settle(), manager.current_step(), group.w[0].item()

    one, two = World(tmp_path).run(finishes, is_behind)
    assert one == two == (True, 100_000, 7.0)


def test_settling_alone_says_that_nobody_came(tmp_path: Path) -> None:
    def story(group: Group) -> bool:
        manager = group.manager()
        return manager.settle(timeout=timedelta(seconds=1))

    assert World(tmp_path, min_replicas=2).run(story) == [False]


LARGE = 4 * SLICE_BYTES // 4
"""Elements of fp32 that travel in four pieces: a donor can die between two of them."""


def trains(group: Group, manager: Manager) -> bool:
    """One step that changes the large weight by the average; whether it was committed."""
    committed, mean = step(manager, group.number + 0.1)
    if committed:
        group.w += mean
    return committed


def trains_until_counted(group: Group, manager: Manager, groups: int) -> None:
    while not trains(group, manager) or manager.num_participants() != groups:
        pass


def test_a_donor_dies_while_its_state_travels_and_another_donor_is_asked(tmp_path: Path) -> None:
    def three_train_and_one_dies(group: Group) -> Manager:
        group.w = torch.zeros(LARGE)
        manager = group.manager()
        trains_until_counted(group, manager, 3)
        if group.number == 2:
            group.dies()
        trains_until_counted(group, manager, 2)
        group.world.happen(f"{group.name} goes on with two")
        return manager

    def donor(group: Group) -> None:
        send = Stream.send

        def dies_between_two_pieces(stream: Stream, piece: Any) -> None:
            send(stream, piece)
            if sum(len(view) for view in piece) >= SLICE_BYTES:
                group.world.wait("a piece has arrived")
                group.dies()

        manager = three_train_and_one_dies(group)
        Stream.send = dies_between_two_pieces  # type: ignore[method-assign]
        while True:
            trains(group, manager)

    def other_donor(group: Group) -> Any:
        manager = three_train_and_one_dies(group)
        while manager.num_participants() < 3:
            trains(group, manager)
        trains_until_counted(group, manager, 2)
        return manager.current_step(), digest(group.w)

    def comes_back(group: Group) -> Any:
        for name in ("group_0", "group_1"):
            group.world.wait(f"{name} goes on with two")
        read_into = Stream.read_into

        def tells(stream: Stream, memory: memoryview) -> None:
            read_into(stream, memory)
            if len(memory) >= SLICE_BYTES:
                group.world.happen("a piece has arrived")

        Stream.read_into = tells  # type: ignore[method-assign]
        group.w = torch.full((LARGE,), -1.0)
        manager = group.manager(replica_id="group_2")
        began = time.monotonic()
        assert not trains(group, manager)
        assert time.monotonic() - began < 10.0  # half of any deadline
        error = manager.errored()
        assert error is not None and isinstance(error.original_exception, HealError), error
        assert "from group_0" in str(error), error
        assert group.w.eq(-1.0).all(), "half a state was loaded"
        trains_until_counted(group, manager, 2)
        return manager.current_step(), digest(group.w)

    stories = donor, other_donor, three_train_and_one_dies, comes_back
    first, stayed, second, healed = World(tmp_path).run(*stories)
    assert first == second == KILLED
    assert stayed == healed


def test_two_groups_of_two_ranks_open_a_run_without_waiting_for_each_other(tmp_path: Path) -> None:
    def story(group: Group) -> list[float]:
        group.w.fill_(group.number + 1.0)
        manager = group.manager(use_async_quorum=False, min_replica_size=2)
        peers = ManagedPeers(manager)
        began = time.monotonic()
        first = peers.open(Place.AFTER)
        assert first.opening
        second = peers.open(Place.AFTER)
        (mean,) = second.average([torch.full((1, 1), group.number * 2.0)]).wait()
        assert second.close()
        assert time.monotonic() - began < 10.0  # half of the timeout of a vote
        return [group.rank, group.w[0].item(), mean.item()]

    results = World(tmp_path, min_replicas=2).run(story, story, ranks=2)
    (one, two), (three, four) = results[:2], results[2:]
    assert one == three and two == four
    assert one[2] == two[2] == 1.0
