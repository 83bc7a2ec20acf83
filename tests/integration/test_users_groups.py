"""Process groups of a user's own, written for any generation of torchft's interface, under real
managers."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from helpers.threads import Group, groups

from torchft.process_group import ProcessGroup, ProcessGroupGloo

LONG = timedelta(seconds=30)


class _Four(ProcessGroupGloo):
    """As written for torchft 0.1.1."""

    def configure(  # type: ignore[override]
        self, store_addr: str, replica_id: str, rank: int, world_size: int
    ) -> None:
        super().configure(store_addr, replica_id, rank, world_size)


class _Eight(ProcessGroupGloo):
    """As written for torchft 0.2."""

    asked: tuple[Any, ...] = ()

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        group_rank: int | None = None,
        group_world_size: int | None = None,
        global_ranks: list[int] | None = None,
    ) -> None:
        self.asked = (replica_id, rank, quorum_id, group_rank, group_world_size, global_ranks)
        super().configure(store_addr, replica_id, rank, world_size)


def _steps(group: Group, pg: ProcessGroup, upto: int = 2) -> list[float]:
    """The averages of its committed steps."""
    group.undo.callback(pg.shutdown)
    manager = group.manager(pg=pg)
    averages = []
    while manager.current_step() < upto:
        manager.start_quorum()
        tensor = torch.full((3,), float(group.number + 1))
        manager.allreduce(tensor).wait()
        if manager.should_commit():
            averages.append(tensor.mean().item())
    return averages


def test_a_configure_of_four_arguments_gets_four() -> None:
    assert groups(2, lambda group: _steps(group, _Four(LONG))) == [[1.5] * 2] * 2


def test_a_configure_of_eight_arguments_gets_the_quorum_and_all_ranks() -> None:
    def story(group: Group) -> tuple[list[float], tuple[Any, ...]]:
        pg = _Eight(LONG)
        return _steps(group, pg), pg.asked

    asked = []
    for averages, (replica_id, rank, quorum_id, *ranks) in groups(2, story):
        assert averages == [1.5] * 2
        assert isinstance(quorum_id, int)
        asked.append((replica_id, rank, *ranks))
    assert asked == [("group_0", 0, 0, 1, [0, 1]), ("group_1", 1, 0, 1, [0, 1])]
