"""How a group starts alone, and how it ends with the others."""

from __future__ import annotations

import pytest
from helpers.clock import Clock

from torchft.script.finish_barrier import FinishBarrier


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def barrier(clock: Clock) -> FinishBarrier:
    return FinishBarrier(steps=100, groups=3, patience_s=60, clock=clock, agree=bool)


def test_it_ends_with_a_last_step_that_all_took_part_in(barrier: FinishBarrier) -> None:
    assert list(barrier.committed(99, 3)) == []
    assert not barrier.reached
    assert list(barrier.committed(100, 3)) == []
    assert barrier.reached


def test_a_missing_group_is_waited_for_and_that_is_said_once(
    barrier: FinishBarrier, clock: Clock
) -> None:
    (news,) = barrier.committed(100, 2)
    assert "1 of 3 groups away: goes on for up to 60 s" in news
    clock.now = 59.0
    assert list(barrier.committed(150, 2)) == []
    assert not barrier.reached
    assert list(barrier.committed(151, 3)) == []
    assert barrier.reached


def test_who_does_not_come_back_is_not_waited_for_for_ever(
    barrier: FinishBarrier, clock: Clock
) -> None:
    list(barrier.committed(100, 2))
    clock.now = 60.0
    assert list(barrier.committed(160, 2)) == ["ends at step 160 without 1 of 3 groups"]
    assert barrier.reached


def test_rank_0_decides_for_its_group_whose_clocks_differ(clock: Clock) -> None:
    second = FinishBarrier(steps=1, groups=2, patience_s=0, clock=clock, agree=lambda _: False)
    list(second.committed(5, 1))
    assert not second.reached


def test_a_fresh_start_alone_is_said(barrier: FinishBarrier) -> None:
    assert list(barrier.committed(1, 1)) == [
        "starts afresh from step 0, alone: none of the other 2 is there"
    ]
    assert list(barrier.committed(1, 2)) == []


def test_a_group_of_one_is_not_alone() -> None:
    assert list(FinishBarrier(steps=9, groups=1, patience_s=0).committed(1, 1)) == []


def test_who_missed_the_last_step_heals_that_it_was_the_last(barrier: FinishBarrier) -> None:
    late = FinishBarrier(steps=100, groups=3, patience_s=60)
    list(barrier.committed(100, 3))
    late.load_state_dict(barrier.state_dict())
    assert late.reached
