"""Pauses between attempts, by a clock that only sleeping moves."""

from __future__ import annotations

from itertools import islice

import pytest

from torchft.retry import pauses, wait_until


class Clock:
    def __init__(self) -> None:
        self.now, self.slept = 100.0, 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.slept += 1


def test_pauses_double_up_to_the_longest() -> None:
    longest_drawn = pauses(0.1, 0.5, uniform=lambda least, most: most)
    assert list(islice(longest_drawn, 5)) == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])


def test_a_pause_is_at_least_half_as_long_and_two_waiters_draw_different_ones() -> None:
    one, other = (list(islice(pauses(1.0, 1.0), 50)) for _ in range(2))
    assert all(0.5 <= pause <= 1.0 for pause in one)
    assert one != other


def test_what_has_happened_is_not_waited_for() -> None:
    clock = Clock()
    assert wait_until(lambda: True, 0.0, clock=clock, sleep=clock.sleep)
    assert clock.slept == 0


def test_what_happens_in_time_is_seen_within_one_pause() -> None:
    clock = Clock()
    assert wait_until(lambda: clock.now >= 103.0, 60.0, clock=clock, sleep=clock.sleep)
    assert clock.now <= 103.0 + 0.02


def test_the_last_look_is_at_the_deadline() -> None:
    clock = Clock()
    looks: list[float] = []
    waited = wait_until(
        lambda: looks.append(clock.now), 1.0, longest_s=0.3, clock=clock, sleep=clock.sleep
    )
    assert not waited
    assert looks[0] == 100.0 and looks[-1] == pytest.approx(101.0)
