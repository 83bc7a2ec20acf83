"""Slots, and which fragment goes next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.errors import SettingsError
from torchft.strategies.rounds_schedule import RoundSchedule, next_fragment


def slots(every: int, fragments: int, steps: int) -> list[int]:
    schedule = RoundSchedule(every, fragments)
    return [step for step in range(1, steps + 1) if schedule.advance()]


def test_the_schedule_that_users_know() -> None:
    assert slots(500, 4, 1000) == [125, 250, 375, 500, 625, 750, 875, 1000]


# An old failing that must not come back: H = 10 with 4 fragments sent 0, 1, 2, 3, 0 in a cycle.
def test_steps_that_fragments_do_not_divide() -> None:
    assert slots(10, 4, 20) == [2, 5, 7, 10, 12, 15, 17, 20]


@given(st.integers(1, 60), st.integers(1, 60))
def test_each_fragment_once_a_cycle(every: int, fragments: int) -> None:
    if fragments > every:
        with pytest.raises(SettingsError):
            RoundSchedule(every, fragments)
        return
    expected = [k * every // fragments for k in range(1, 3 * fragments + 1)]
    assert slots(every, fragments, 3 * every) == expected


def test_another_number_of_steps_holds_from_the_next_cycle_on() -> None:
    schedule = RoundSchedule(4, 2)
    found = []
    for step in range(1, 13):
        if step == 3:
            schedule.change(8)
        if schedule.advance():
            found.append(step)
    assert found == [2, 4, 8, 12]


def test_the_fragment_that_is_furthest_behind_goes_next() -> None:
    assert next_fragment([0, 0, 0], set()) == 0
    assert next_fragment([1, 0, 0], {1}) == 2
    assert next_fragment([1], {0}) is None
