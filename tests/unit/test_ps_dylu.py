"""Steps by speed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchft.parameter_server.core.dylu import local_steps


def test_a_quarter_of_the_speed_is_a_quarter_of_the_steps() -> None:
    speeds = {"fast": 4.0, "slow": 1.0}
    assert [local_steps(100, speeds, worker) for worker in speeds] == [100, 25]


def test_one_whose_speed_is_unknown_takes_them_all() -> None:
    assert local_steps(100, {"new": 0.0, "old": 2.0}, "new") == 100
    assert local_steps(100, {}, "new") == 100


def test_nobody_takes_none() -> None:
    assert local_steps(10, {"fast": 1000.0, "slow": 1.0}, "slow") == 1


@given(st.integers(1, 10_000), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_the_fastest_takes_them_all_and_nobody_more(base: int, speeds: list[float]) -> None:
    named = {str(index): speed for index, speed in enumerate(speeds)}
    steps = {worker: local_steps(base, named, worker) for worker in named}
    assert max(steps.values()) == base
    assert min(steps.values()) >= 1
