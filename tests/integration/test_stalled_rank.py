"""A rank that stands still ends its own group and no other."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from steps import all_are_in, step
from world import KILLED, Group, World

T = timedelta(seconds=5)


@pytest.mark.slow
def test_a_rank_that_stands_still_does_not_end_the_healthy_group(tmp_path: Path) -> None:
    """With equal deadlines both ranks of the healthy group gave up on each other."""

    def healthy(group: Group) -> Any:
        group.pg.set_timeout(T)
        manager = group.manager(timeout=T, quorum_timeout=timedelta(seconds=60))
        all_are_in(manager, 2)
        before = manager.current_step()
        while manager.current_step() < before + 2 or manager.num_participants() == 2:
            step(manager, 1.0)
        return manager.num_participants()

    def sick(group: Group) -> Any:
        group.pg.set_timeout(T)
        manager = group.manager(timeout=T, quorum_timeout=timedelta(seconds=60))
        all_are_in(manager, 2)
        if group.rank == 1:
            manager.start_quorum()
            manager.wait_quorum()
            group.world.happen("stands still", str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        with suppress(TimeoutError):  # as it should: the group cannot go on
            step(manager, 1.0)
        os.kill(int(group.world.wait("stands still")), signal.SIGKILL)
        group.dies()

    world = World(tmp_path, min_replicas=1, deadline_s=100.0)
    assert world.run(healthy, sick, ranks=2) == [1, 1, KILLED, KILLED]
