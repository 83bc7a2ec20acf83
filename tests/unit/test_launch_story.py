"""The plot of a demo run: who is killed when, and when it comes back."""

from __future__ import annotations

import pytest

from torchft.demo.scenario import Director, Kill, Part, Restart, Scene, Story
from torchft.errors import SettingsError

STORY = Story(victim=1, at_step=40, after_s=0.05)


def scene(now: float, step: int = 0, *, all_took_part: bool = True, went_on: bool = False) -> Scene:
    return Scene(now=now, victim_step=step, all_took_part=all_took_part, went_on=went_on)


def test_the_same_seed_tells_the_same_story() -> None:
    assert Story.from_seed(3, groups=3, steps=100) == Story.from_seed(3, groups=3, steps=100)
    stories = {Story.from_seed(seed, groups=3, steps=100) for seed in range(50)}
    assert len(stories) == 50
    assert {story.victim for story in stories} == {0, 1, 2}


@pytest.mark.parametrize("steps", [4, 10, 333])
def test_the_kill_is_in_the_middle_part(steps: int) -> None:
    for seed in range(50):
        story = Story.from_seed(seed, groups=2, steps=steps)
        assert 1 <= story.at_step <= steps / 2
        assert 0 <= story.after_s <= 0.1


def test_one_group_cannot_lose_one() -> None:
    with pytest.raises(SettingsError, match="--replicas 2"):
        Story.from_seed(0, groups=1, steps=100)


def test_a_run_without_a_middle_is_refused() -> None:
    with pytest.raises(SettingsError, match="--steps 4"):
        Story.from_seed(0, groups=3, steps=3)


def test_kill_then_restart_and_each_only_once() -> None:
    director = Director(STORY)
    assert director.decide(scene(1.0, 39)) is None
    assert director.decide(scene(2.0, 40)) is None
    assert director.part is Part.AIMED
    assert director.decide(scene(2.06, 42)) == Kill(1)
    assert director.decide(scene(2.07, 42)) is None
    assert director.decide(scene(3.5, 42, went_on=True)) == Restart(1)
    assert director.decide(scene(3.6, 42, went_on=True)) is None


def test_nobody_is_killed_before_all_have_taken_part() -> None:
    director = Director(STORY)
    assert director.decide(scene(2.0, 90, all_took_part=False)) is None
    assert director.part is Part.BEGINNING


def test_a_victim_comes_back_even_if_the_others_are_stuck() -> None:
    director = Director(Story(victim=1, at_step=40, after_s=0.0))
    assert director.decide(scene(2.0, 40)) == Kill(1)
    assert director.decide(scene(11.9)) is None
    assert director.decide(scene(12.0)) == Restart(1)


def test_without_a_story_nothing_happens() -> None:
    assert Director(None).decide(scene(2.0, 1000)) is None
