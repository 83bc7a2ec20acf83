"""Deadlines of a transfer: one that stands, and one that moves on with every byte."""

from __future__ import annotations

from urllib.error import URLError

import pytest
from helpers.clock import Clock

from torchft.checkpointing.stream import Deadline, ProgressDeadline
from torchft.checkpointing.transport import SLOWEST
from torchft.errors import TransferTimeoutError


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_plain_deadline_stands_whatever_moves(clock: Clock) -> None:
    deadline = Deadline(10, clock)
    clock.now += 9
    deadline.moved(1 << 20)
    assert deadline.remaining() == 1
    clock.now += 1
    with pytest.raises(TimeoutError, match="not done within 10 s"):
        deadline.remaining()


def test_each_byte_gives_a_transfer_its_whole_time_again(clock: Clock) -> None:
    deadline = ProgressDeadline(10, 100, clock)
    for _ in range(9):
        clock.now += 9
        deadline.moved(5)
        assert deadline.remaining() == 10
    clock.now += 10
    with pytest.raises(TransferTimeoutError, match="no byte within 10 s, after 45"):
        deadline.remaining()


def test_a_transfer_that_drips_ends_at_the_limit(clock: Clock) -> None:
    deadline = ProgressDeadline(10, 25, clock)
    for _ in range(4):
        clock.now += 6
        deadline.moved(1)
    assert deadline.remaining() == pytest.approx(1, abs=0.001)
    clock.now += 1.001
    with pytest.raises(TimeoutError, match="4 bytes in 25 s, and not done"):
        deadline.remaining()


def test_a_large_state_over_a_slow_link_may_take_hours(clock: Clock) -> None:
    deadline = ProgressDeadline(10, 100, clock)
    for _ in range(3600):
        clock.now += 2
        deadline.moved(2 * SLOWEST)
    assert deadline.remaining() == 10
    clock.now += 10
    with pytest.raises(TransferTimeoutError, match="no byte within 10 s"):
        deadline.remaining()


def test_a_transfer_that_timed_out_is_caught_as_the_standard_library_names_it() -> None:
    error = TransferTimeoutError("no byte within 10 s")
    assert isinstance(error, TimeoutError) and isinstance(error, URLError)
    assert str(error) == error.reason == "no byte within 10 s"
