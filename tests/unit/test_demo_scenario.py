"""The plot of a demo run: who is killed when, and when it comes back."""

from __future__ import annotations

import pytest

from torchft.demo.group_scenario import Scenario
from torchft.demo.scenario import Controller, KillProcess, RunSnapshot, StartProcess
from torchft.errors import SettingsError

SCENARIO = Scenario(victim=1, at_step=40, after_s=0.05)


def snapshot(
    now: float, step: int = 0, *, all_took_part: bool = True, went_on: bool = False
) -> RunSnapshot:
    return RunSnapshot(
        now=now, steps={"group 1": step}, all_took_part=all_took_part, went_on=went_on
    )


def test_the_same_seed_tells_the_same_story() -> None:
    assert Scenario.from_seed(3, groups=3, steps=100) == Scenario.from_seed(3, groups=3, steps=100)
    stories = {Scenario.from_seed(seed, groups=3, steps=100) for seed in range(50)}
    assert len(stories) == 50
    assert {scenario.victim for scenario in stories} == {0, 1, 2}


@pytest.mark.parametrize("steps", [4, 10, 333])
def test_the_kill_is_in_the_middle_part(steps: int) -> None:
    for seed in range(50):
        scenario = Scenario.from_seed(seed, groups=2, steps=steps)
        assert 1 <= scenario.at_step <= steps / 2
        assert 0 <= scenario.after_s <= 0.1


def test_one_group_cannot_lose_one() -> None:
    with pytest.raises(SettingsError, match="--replicas 2"):
        Scenario.from_seed(0, groups=1, steps=100)


def test_a_run_without_a_middle_is_refused() -> None:
    with pytest.raises(SettingsError, match="--steps 4"):
        Scenario.from_seed(0, groups=3, steps=3)


def test_kill_then_restart_and_each_only_once() -> None:
    controller = Controller(SCENARIO.stages)
    assert controller.decide(snapshot(1.0, 39)) is None
    assert controller.decide(snapshot(2.0, 40)) is None
    assert controller.waits == "until the moment of the kill"
    assert controller.decide(snapshot(2.06, 42)) == KillProcess("group 1")
    assert controller.decide(snapshot(2.07, 42)) is None
    assert controller.decide(snapshot(3.5, 42, went_on=True)) == StartProcess("group 1")
    assert controller.decide(snapshot(3.6, 42, went_on=True)) is None


def test_nobody_is_killed_before_all_have_taken_part() -> None:
    controller = Controller(SCENARIO.stages)
    assert controller.decide(snapshot(2.0, 90, all_took_part=False)) is None
    assert controller.waits == "until group 1 reaches step 40"


def test_a_victim_comes_back_even_if_the_others_are_stuck() -> None:
    controller = Controller(Scenario(victim=1, at_step=40, after_s=0.0).stages)
    assert controller.decide(snapshot(2.0, 40)) == KillProcess("group 1")
    assert controller.decide(snapshot(11.9)) is None
    assert controller.decide(snapshot(12.0)) == StartProcess("group 1")


def test_without_a_story_nothing_happens() -> None:
    assert Controller().decide(snapshot(2.0, 1000)) is None
