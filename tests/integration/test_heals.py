"""How a group gets the current state: when it joins, when it fell behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import BOTH_MODES, all_are_in, step
from world import KILLED, Group, World

from torchft.checkpointing.pg_transport import PGTransport
from torchft.checkpointing.snapshot import SLICE_BYTES
from torchft.checkpointing.stream import Stream
from torchft.digest import digest
from torchft.errors import (
    DiscardedTooOften,
    HealError,
    PhaseError,
    StateDictError,
    TorchftError,
)
from torchft.manager import Manager
from torchft.manager.peers import ManagerPeers
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


def no_memory(state: Any) -> None:
    raise RuntimeError("no memory")


def commits_while_a_joiner_fails(group: Group) -> tuple[int, list[str]]:
    """How many steps a group discarded from the joiner's start to its end, and why."""
    manager = group.manager()
    why: list[str] = []
    for _ in range(2):
        step(manager, 1.0)
    if group.rank == 0:
        group.world.happen("running")
    waiting = ["joiner 0 is gone", "joiner 1 is gone"]
    # Rank 0 says at which step all end: another rank may see a joiner go one step later.
    while waiting if group.rank == 0 else not group.world.happened("the end is known"):
        over = bool(waiting) and group.world.happened(waiting[0])
        committed = step(manager, 1.0)[0]
        if over and committed:
            waiting.pop(0)
        elif waiting and not over and not committed:
            why.append(str(manager.errored()))
    if group.rank == 0:
        group.world.happen("the end is known", str(manager.current_step() + 5))
    end = int(group.world.wait("the end is known"))
    while manager.current_step() < end:
        assert step(manager, 1.0)[0]
    return len(why), why


def cannot_load_on(rank: int) -> Callable[[Group], str]:
    def story(group: Group) -> str:
        group.world.wait("running")
        manager = group.manager(load_state_dict=no_memory) if group.rank == rank else None
        manager = manager or group.manager()
        began = time.monotonic()
        with pytest.raises(TorchftError) as raised:
            while True:
                step(manager, 1.0)
        assert time.monotonic() - began < 10.0  # half of any deadline
        group.world.happen(f"joiner {group.rank} is gone")
        with pytest.raises(PhaseError) if group.rank == rank else nullcontext():
            manager.start_quorum()
        assert isinstance(raised.value, StateDictError) == (group.rank == rank)
        return str(raised.value)

    return story


def test_a_joiner_that_cannot_load_ends_after_one_try(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.happen("joiner 1 is gone")
    (discarded, why), error = world.run(commits_while_a_joiner_fails, cannot_load_on(0))
    assert discarded <= 1, why
    assert error.startswith("RuntimeError: no memory in load_state_dict of 'default', given step ")
    assert " of group_0" in error and "at group_1" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_of_a_joiner_end_with_the_one_that_cannot_load(tmp_path: Path, rank: int) -> None:
    *healthy, first, second = World(tmp_path).run(
        commits_while_a_joiner_fails, cannot_load_on(rank), ranks=2
    )
    assert [discarded <= 1 for discarded, _ in healthy] == [True, True], healthy
    assert "no memory" in (first, second)[rank]
    assert "no memory" in second or "refused" in second  # the process of rank 0 is gone
    assert rank == 0 or "no memory in load_state_dict" in first


def test_a_donor_that_cannot_read_its_state_sends_the_joiner_to_another(tmp_path: Path) -> None:
    def trains_in_two(group: Group) -> Any:
        reads = 0

        def state_dict() -> Any:
            nonlocal reads
            reads += 1
            if group.number == 0 and reads > 2:  # what is looked at before training is whole
                raise KeyError("ema")
            return {"w": group.w}

        manager = group.manager(state_dict=state_dict, min_replica_size=2)
        all_are_in(manager, 2)
        group.w.fill_(7.0)
        for _ in range(2):
            step(manager, 1.0)
        group.world.happen(f"{group.name} trains")
        while not (step(manager, 1.0)[0] and manager.num_participants() == 3):
            pass
        return manager.current_step()

    def joins(group: Group) -> Any:
        for number in range(2):
            group.world.wait(f"group_{number} trains")
        manager = group.manager(min_replica_size=2)
        began = time.monotonic()
        errors = []
        while not step(manager, 1.0)[0]:
            errors.append(str(manager.errored()))
        assert time.monotonic() - began < 10.0  # half of any deadline
        assert group.w.eq(7.0).all()
        return errors

    *_, errors = World(tmp_path, min_replicas=2).run(trains_in_two, trains_in_two, joins)
    assert len(errors) == 1
    assert errors[0].startswith("the donor refused (500): KeyError: 'ema'")
    assert "the next quorum asks another one" in errors[0]


def test_a_joiner_that_no_donor_can_serve_leaves_after_three_tries(tmp_path: Path) -> None:
    def only_donor(group: Group) -> int:
        def state_dict() -> Any:
            if group.world.happened("running"):
                raise KeyError("ema")
            return {"w": group.w}

        manager = group.manager(state_dict=state_dict)
        for _ in range(2):
            assert step(manager, 1.0)[0]
        group.world.happen("running")
        discarded = 0
        while not group.world.happened("gone"):
            discarded += not step(manager, 1.0)[0]
        while not step(manager, 1.0)[0]:
            pass
        return discarded

    def joins(group: Group) -> str:
        group.world.wait("running")
        manager = group.manager()
        with pytest.raises(DiscardedTooOften) as raised:
            while True:
                step(manager, 1.0)
        group.world.happen("gone")
        return str(raised.value)

    discarded, error = World(tmp_path).run(only_donor, joins)
    assert discarded <= 4  # the third ends the joiner, which the next one may still meet
    assert error.startswith("the donor refused (500): KeyError: 'ema'")
    assert "it is asked again" in error and "3 heals of group_1" in error


def test_a_joiner_takes_part_in_the_others_round_with_zeros(tmp_path: Path) -> None:
    def rounds(group: Group, value: float) -> Any:
        manager = group.manager(use_async_quorum=False)
        peers = ManagerPeers(manager)
        first = peers.open(Place.AFTER)
        if not first.bootstrap:
            (mean,) = first.average([torch.full((1, 1), value)]).wait()
            return mean.item(), first.close(), group.w[0].item(), manager.current_step()
        group.w.fill_(7.0)
        group.world.happen("opened")
        while True:
            round_ = peers.open(Place.AFTER)
            (mean,) = round_.average([torch.full((1, 1), value)]).wait()
            committed = round_.close()
            if len(manager.steps.begun("this").plan.members) == 2:
                return mean.item(), committed, group.w[0].item(), manager.current_step()

    def late(group: Group) -> Any:
        group.world.wait("opened")
        return rounds(group, 9.0)

    world = World(tmp_path)
    one, two = world.run(lambda group: rounds(group, 4.0), late)
    assert one == two
    assert one[:3] == (4.0, True, 7.0)


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
        assert "the donor was group_0" in str(error), error
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
        peers = ManagerPeers(manager)
        began = time.monotonic()
        first = peers.open(Place.AFTER)
        assert first.bootstrap
        second = peers.open(Place.AFTER)
        (mean,) = second.average([torch.full((1, 1), group.number * 2.0)]).wait()
        assert second.close()
        assert time.monotonic() - began < 10.0  # half of the timeout of a vote
        return [group.rank, group.w[0].item(), mean.item()]

    results = World(tmp_path, min_replicas=2).run(story, story, ranks=2)
    (one, two), (three, four) = results[:2], results[2:]
    assert one == three and two == four
    assert one[2] == two[2] == 1.0


def heals_for_longer_than_any_average(group: Group, manager: Manager) -> Any:
    """The first group trains, the second joins over a connection that is throttled."""
    if group.number == 0:
        for _ in range(3):
            assert trains(group, manager)
        group.world.happen("three steps")
        discarded = 0
        while manager.num_participants() < 2:
            discarded += not trains(group, manager)
        return discarded, manager.current_step(), digest(group.w)
    discarded = 0
    while not trains(group, manager):
        discarded += 1
    return discarded, manager.current_step(), digest(group.w)


TIMEOUT_S = 2.0
"""Of anything in which nothing moves. The throttled states need about twice that."""


@pytest.mark.parametrize(("ranks", "over"), [(1, "http"), (2, "http"), (2, "pg")])
def test_a_heal_that_takes_longer_than_the_timeout_is_waited_for(
    tmp_path: Path, ranks: int, over: str
) -> None:
    pieces = 16

    def story(group: Group) -> Any:
        if group.rank == ranks - 1:  # the other rank of a group is done at once, and waits
            group.w = torch.zeros(pieces * SLICE_BYTES // 4)
        if group.number == 1:
            group.world.wait("three steps")
            group.w.fill_(-1.0)
            throttle_reads(2 * TIMEOUT_S / pieces)
        timeout = timedelta(seconds=TIMEOUT_S)
        options: dict[str, Any] = {"timeout": timeout, "quorum_timeout": timedelta(seconds=30)}
        if over == "pg":
            transport: PGTransport[Any] = PGTransport(group.pg, timeout, torch.device("cpu"))
            options["checkpoint_transport"] = transport
            throttle_sends(group, 2 * TIMEOUT_S / pieces)
        manager = group.manager(**options)
        return heals_for_longer_than_any_average(group, manager)

    results = World(tmp_path).run(story, story, ranks=ranks)
    assert results[:ranks] == results[ranks:]
    assert all(discarded == 0 for discarded, _, _ in results), results


def throttle_reads(pause_s: float) -> None:
    """Let a second pass between the large pieces of a state, as on a slow link."""
    read_into = Stream.read_into

    def slowly(stream: Stream, memory: memoryview) -> None:
        if len(memory) >= SLICE_BYTES:
            time.sleep(pause_s)
        read_into(stream, memory)

    Stream.read_into = slowly  # type: ignore[method-assign, assignment]


def throttle_sends(group: Group, pause_s: float) -> None:
    """The same for what travels through the process group."""
    send = group.pg.send

    def slowly(tensors: list[torch.Tensor], rank: int, tag: int) -> Any:
        time.sleep(pause_s * tensors[0].nbytes / SLICE_BYTES)
        return send(tensors, rank, tag)

    group.pg.send = slowly  # type: ignore[method-assign, assignment]


def test_a_joiner_of_rounds_that_cannot_load_ends_after_one_try(tmp_path: Path) -> None:
    def rounds(group: Group) -> int:
        manager = group.manager(use_async_quorum=False)
        peers, failed = ManagerPeers(manager), 0
        assert peers.open(Place.AFTER).bootstrap
        group.world.happen("opened")
        after = 3
        while after:
            round_ = peers.open(Place.AFTER)
            round_.average([torch.zeros(1, 1)])
            failed += not round_.close()
            after -= group.world.happened("gone")
        return failed

    def joins(group: Group) -> str:
        group.world.wait("opened")
        manager = group.manager(use_async_quorum=False, load_state_dict=no_memory)
        with pytest.raises(StateDictError) as raised:
            ManagerPeers(manager).open(Place.AFTER)
        group.world.happen("gone")
        return str(raised.value)

    failed, error = World(tmp_path).run(rounds, joins)
    assert failed <= 1
    assert error.startswith("RuntimeError: no memory in load_state_dict of 'default'")


def test_a_group_that_fell_behind_and_cannot_load_ends_at_its_vote(tmp_path: Path) -> None:
    def goes_on(group: Group) -> None:
        manager = group.manager()
        all_are_in(manager, 2)
        manager.load_state_dict({"step": 100_000, "batches_committed": 100_000})
        assert step(manager, 1.0)[0]  # the other one sends zeros and heals
        group.world.wait("gone")
        while not step(manager, 1.0)[0]:
            pass

    def is_behind(group: Group) -> None:
        met = threading.Event()
        manager = group.manager(load_state_dict=lambda w: no_memory(w) if met.is_set() else None)
        all_are_in(manager, 2)
        met.set()
        with pytest.raises(StateDictError, match="no memory"):
            step(manager, 1.0)
        group.world.happen("gone")

    World(tmp_path).run(goes_on, is_behind)


@pytest.mark.parametrize("over", ["http", "pg"])
def test_state_that_cannot_travel_ends_its_group_before_training(tmp_path: Path, over: str) -> None:
    def story(group: Group) -> str:
        cpu = torch.device("cpu")
        transport: PGTransport[Any] = PGTransport(group.pg, timedelta(seconds=20), cpu)
        options: dict[str, Any] = {"checkpoint_transport": transport} if over == "pg" else {}
        manager = group.manager(state_dict=lambda: {"w": group.w, "f": [print]}, **options)
        with pytest.raises(StateDictError) as raised:
            manager.start_quorum()
        manager.shutdown()
        return str(raised.value)

    (error,) = World(tmp_path).run(story)
    assert error.startswith("state_dict['f'][0]: a builtin_function_or_method cannot travel")
    assert "registered as 'default'" in error
