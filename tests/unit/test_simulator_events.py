"""Who is there, step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from torchft.errors import SettingsError
from torchft.simulator.events import Dies, Discards, Event, Joins, Membership, Misses, check_events


def attend(*events: Event, nodes: int = 3) -> Membership:
    return Membership(nodes, events)


def test_a_node_is_gone_when_its_step_begins() -> None:
    there = attend(Dies(1, step=5))
    assert there.begin(4) == []
    assert there.begin(5) == [1]
    assert there.alive == [0, 2]
    assert there.lives == [0, 1, 0]


def test_a_node_that_starts_waits_until_a_round_opens() -> None:
    there = attend(Dies(1, 2), Joins(1, 4))
    there.begin(2)
    assert there.admit() == []
    there.begin(4)
    assert there.alive == [0, 2]
    assert there.admit() == [(1, 0)]
    assert there.alive == [0, 1, 2]
    assert there.admit() == []


def test_a_node_that_starts_later_is_absent_at_first() -> None:
    there = attend(Joins(0, 3), nodes=2)
    assert there.alive == [1]
    there.begin(3)
    assert there.admit() == [(0, 1)]


def test_several_heal_from_whom_they_ask_for() -> None:
    there = attend(Joins(0, 1), Joins(2, 1, donor=3), nodes=4)
    there.begin(1)
    assert there.admit() == [(0, 1), (2, 3)]


def test_nobody_heals_from_one_that_is_not_there() -> None:
    there = attend(Joins(0, 1, donor=2), Dies(2, 1))
    there.begin(1)
    with pytest.raises(SettingsError, match="node 0 cannot heal from node 2"):
        there.admit()


def test_a_death_in_a_round_waits_for_one_to_open() -> None:
    there = attend(Dies(1, 5, in_round=True))
    there.begin(5)
    assert there.alive == [0, 1, 2]
    assert there.strike(4) == []
    assert there.strike(7) == [1]
    assert there.alive == [0, 2]
    assert there.strike(8) == []


def test_a_node_does_not_start_again_before_the_round_that_it_is_to_die_in() -> None:
    there = attend(Dies(1, 5, in_round=True), Joins(1, 6))
    there.begin(6)
    assert there.waiting == {}
    there.strike(9)
    there.begin(10)
    assert there.waiting == {1: None}


def test_one_that_dies_while_it_waits_does_not_come() -> None:
    there = attend(Joins(1, 2), Dies(1, 3))
    there.begin(2)
    there.begin(3)
    assert there.admit() == []


def test_one_that_missed_a_commit_heals_again() -> None:
    there = attend(Misses(1, 4, donor=2))
    assert there.miss(3) == []
    assert there.miss(4) == [1]
    assert there.alive == [0, 2]
    assert there.admit() == [(1, 2)]


def test_rounds_of_a_discarded_step_do_not_go_through() -> None:
    there = attend(Discards(4))
    assert [there.goes(step) for step in (3, 4, 5)] == [True, False, True]


def test_the_last_one_does_not_leave() -> None:
    there = attend(Joins(1, 1), Dies(0, 1, in_round=True), nodes=2)
    there.strike(1)
    with pytest.raises(SettingsError, match="nobody is left at step 2"):
        there.begin(2)


def test_it_goes_on_from_what_was_saved() -> None:
    events = [Dies(1, 2), Joins(1, 4), Dies(2, 6, in_round=True), Dies(0, 9)]
    one = attend(*events)
    for step in range(5):
        one.begin(step)
    other = attend(*events)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.admit() == one.admit() == [(1, 0)]
    for there in (one, other):
        there.begin(9)
        assert there.strike(9) == [2]
        assert there.alive == [1]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([Dies(3, 1)], "the nodes are 0 to 2"),
        ([Dies(-1, 1)], "the nodes are 0 to 2"),
        ([Dies(1, -1)], "count steps from 0"),
        ([Dies(1, 1), Dies(1, 2)], "not there at that step"),
        ([Dies(1, 1), Joins(1, 2), Joins(1, 3)], "there already at that step"),
        ([Dies(1, 1), Misses(1, 2)], "not there at that step"),
        ([Dies(0, 1), Dies(1, 2), Dies(2, 3)], "nobody is left after it"),
        ([Joins(0, 1), Joins(1, 2), Joins(2, 3)], "no node is there at the start"),
    ],
)
def test_events_that_cannot_be_are_refused(events: Sequence[Event], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_events(3, events)
