"""What one group does wrong: it costs a step, and never holds up or ends the others."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import all_are_in, step
from world import Group, World

from torchft.errors import DeviceLostError, MismatchError
from torchft.process_group import FakeProcessGroupWrapper

PROMPT_S = 5.0
"""Far below the 20 seconds of the deadlines in these tests."""


def test_a_step_that_is_begun_anew_frees_those_who_wait_in_it(tmp_path: Path) -> None:
    def raises_in_its_loop(group: Group) -> Any:
        manager = group.manager()
        all_are_in(manager, 2)
        began = time.monotonic()
        manager.start_quorum()
        manager.allreduce(torch.ones(3))
        # Here an exception was caught, and the loop goes on with the next batch.
        return step(manager, 1.0), time.monotonic() - began < PROMPT_S

    def waits(group: Group) -> Any:
        manager = group.manager()
        all_are_in(manager, 2)
        manager.start_quorum()
        manager.allreduce(torch.ones(3)).wait()
        manager.allreduce(torch.ones(4)).wait()
        assert not manager.should_commit()
        return step(manager, 1.0), True

    one, two = World(tmp_path).run(raises_in_its_loop, waits)
    assert one == two == ((True, 1.0), True)


def test_an_error_reported_after_the_vote_costs_the_others_no_deadline(tmp_path: Path) -> None:
    def story(group: Group) -> Any:
        manager = group.manager()
        all_are_in(manager, 2)
        before = manager.current_step()
        began = time.monotonic()
        if group.number == 0:
            manager.report_error(RuntimeError("late"))
        step(manager, 1.0)
        last = step(manager, 1.0)
        return last, manager.current_step() - before, time.monotonic() - began < PROMPT_S

    one, two = World(tmp_path).run(story, story)
    # The error belongs to no step, but the process group that it broke is made anew.
    assert one == two == ((True, 1.0), 2, True)


def test_an_error_while_the_process_group_is_made_frees_the_others_at_once(tmp_path: Path) -> None:
    def fails(group: Group) -> Any:
        manager = group.manager(init_sync=False)
        manager.start_quorum()
        group.world.wait("the other one is late")
        manager.report_error(RuntimeError("bad batch"))
        group.world.happen("reported")
        return manager.should_commit(), step(manager, 1.0), True

    def is_late(group: Group) -> Any:
        manager = group.manager(init_sync=False)
        configure = group.pg.configure

        def configure_late(*arguments: Any) -> None:
            group.world.happen("the other one is late")
            group.world.wait("reported")
            configure(*arguments)

        group.pg.configure = configure_late  # type: ignore[method-assign]
        began = time.monotonic()
        first = step(manager, 1.0)[0]
        took = time.monotonic() - began
        return first, step(manager, 1.0), took < 2.0

    one, two = World(tmp_path, min_replicas=2).run(fails, is_late)
    assert one == two == (False, (True, 1.0), True)


def test_a_group_of_another_size_is_refused_and_costs_the_others_a_step(tmp_path: Path) -> None:
    def right(group: Group) -> str:
        manager = group.manager()
        while manager.errored() is None:
            step(manager, 1.0)
            group.world.happen("running")
        group.world.wait("left")
        while not step(manager, 1.0)[0]:
            pass
        return "goes on"

    def wrong(group: Group) -> list[str]:
        group.world.wait("running")
        said: list[str] = []

        def rank(number: int) -> None:
            manager = group.manager(rank=number, world_size=2)
            with pytest.raises(MismatchError) as raised:
                step(manager, 1.0)
            said.append(str(raised.value))
            group.world.happen(f"rank {number} is refused")
            group.world.wait(f"rank {1 - number} is refused")
            manager.shutdown()

        ranks = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
        group.world.happen("left")
        return said

    went, said = World(tmp_path).run(right, wrong)
    assert went == "goes on"
    assert len(said) == 2
    assert all("has 2 ranks and group_0" in words for words in said)


def test_a_donor_that_cannot_save_its_state_goes_on(tmp_path: Path) -> None:
    def cannot_save() -> Any:
        raise RuntimeError("out of memory")

    def donor(group: Group) -> bool:
        manager = group.manager(state_dict=cannot_save)
        step(manager, 1.0)
        group.world.happen("running")
        while not group.world.happened("left"):
            step(manager, 1.0)
        while not step(manager, 1.0)[0]:
            pass
        return True

    def joins(group: Group) -> bool:
        group.world.wait("running")
        manager = group.manager(timeout=timedelta(seconds=2))
        committed = step(manager, 1.0)[0]
        manager.shutdown()
        group.world.happen("left")
        return committed

    assert World(tmp_path).run(donor, joins) == [True, False]


def test_a_group_whose_device_fails_leaves_and_the_others_go_on(tmp_path: Path) -> None:
    def loses_its_device(group: Group) -> str:
        pg = FakeProcessGroupWrapper(group.pg)
        manager = group.manager(pg=pg)
        all_are_in(manager, 2)
        pg.report_future_error(RuntimeError("CUDA error: an illegal memory access was encountered"))
        with pytest.raises(DeviceLostError) as raised:
            step(manager, 1.0)
        group.world.happen("left")
        return str(raised.value)

    def goes_on(group: Group) -> int:
        manager = group.manager()
        all_are_in(manager, 2)
        while not (group.world.happened("left") and step(manager, 1.0)[0]):
            step(manager, 1.0)
        return manager.num_participants()

    said, left = World(tmp_path).run(loses_its_device, goes_on)
    assert left == 1
    assert "a device of group_0" in said and "CUDA error: an illegal memory access" in said
    assert "the group leaves the job, and the others go on: start it again" in said
