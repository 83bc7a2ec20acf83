"""When fragments synchronise: after inner step ⌊kH/n⌋, for any H and any number of fragments."""

from __future__ import annotations

from itertools import pairwise

import pytest
from helpers.peers import Node, Script, World
from helpers.reference import OUTER
from helpers.tiny import Tiny
from hypothesis import given
from hypothesis import strategies as st

from torchft.errors import SettingsError
from torchft.peers import Place
from torchft.strategies import DiLoCoRecipe, ModelLocal, Strategy
from torchft.strategies.diloco import check_schedule
from torchft.strategies.rounds_schedule import is_slot


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, int]:
    every = draw(st.integers(1, 200))
    return every, draw(st.integers(1, every))


@given(schedules())
def test_every_fragment_has_its_turn_once_in_h_steps(schedule: tuple[int, int]) -> None:
    every, fragments = schedule
    slots = [step for step in range(1, 3 * every + 1) if is_slot(step, every, fragments)]
    assert slots == [k * every // fragments for k in range(1, 3 * fragments + 1)]
    gaps = {later - earlier for earlier, later in pairwise([0, *slots])}
    assert gaps <= {every // fragments, -(-every // fragments)}


@given(schedules(), st.data())
def test_a_delay_fits_until_the_fragments_next_round(
    schedule: tuple[int, int], data: st.DataObject
) -> None:
    every, fragments = schedule
    check_schedule(every, fragments, data.draw(st.integers(0, every)), 0.0)
    with pytest.raises(SettingsError, match=f"use 0 to {every}"):
        check_schedule(every, fragments, every + data.draw(st.integers(1, 50)), 0.0)


@given(schedules(), st.data())
def test_a_fragment_is_back_before_it_is_its_turn(
    schedule: tuple[int, int], data: st.DataObject
) -> None:
    every, fragments = schedule
    delay = data.draw(st.integers(0, every))
    in_flight: list[int] = []
    for step in range(1, 3 * every + 1):
        in_flight = [closes for closes in in_flight if closes > step]
        if is_slot(step + delay, every, fragments):
            assert len(in_flight) < fragments
            in_flight.append(step + delay)


@given(schedules(), st.data())
def test_it_rests_where_some_step_has_no_round_in_flight(
    schedule: tuple[int, int], data: st.DataObject
) -> None:
    every, fragments = schedule
    delay = data.draw(st.integers(0, every))
    recipe = DiLoCoRecipe(OUTER, every, fragments=fragments, delay=delay)
    slots = [step for step in range(4 * every + 1) if is_slot(step, every, fragments)]
    in_flight = {step for slot in slots for step in range(slot - delay, slot)}
    assert recipe.rests is not in_flight.issuperset(range(every, 2 * every))


def rounds_of(every: int, delay: int, steps: int) -> list[tuple[int, int, int]]:
    """(opened after step, closed after step, fragment) of each round of two fragments."""
    seen: list[tuple[int, int, int]] = []

    def story(node: Node) -> None:
        recipe = DiLoCoRecipe(OUTER, every, fragments=2, delay=delay)
        strategy = Strategy([recipe]).bind(ModelLocal([Tiny()]), node)
        opened: list[int] = []
        real = node.open

        def spied(place: Place) -> object:
            opened.append(strategy.clock.steps)
            return real(place)

        node.open = spied  # type: ignore[assignment,method-assign]
        apply = recipe.apply

        def applied(fragment: object, received: object) -> object:
            seen.append((opened[len(seen)], strategy.clock.steps, fragment.index))  # type: ignore[attr-defined]
            return apply(fragment, received)  # type: ignore[arg-type]

        recipe.apply = applied  # type: ignore[assignment,method-assign]
        for _ in range(steps):
            strategy.after()

    World(Script(1)).run(story)
    return seen


def test_an_h_that_fragments_do_not_divide() -> None:
    assert rounds_of(5, 0, 10) == [(2, 2, 0), (5, 5, 1), (7, 7, 0), (10, 10, 1)]


def test_a_round_closes_before_the_next_opens_at_the_same_step() -> None:
    # Nothing has moved before the first step, so the first slot only opens.
    assert rounds_of(6, 3, 12) == [(3, 6, 0), (6, 9, 1), (9, 12, 0)]


def test_rounds_are_in_flight_together_and_close_in_the_order_they_opened() -> None:
    assert rounds_of(6, 5, 15) == [(1, 6, 0), (4, 9, 1), (7, 12, 0), (10, 15, 1)]


def test_a_fragment_that_closes_where_it_opens_again() -> None:
    assert rounds_of(4, 4, 14) == [(2, 6, 0), (4, 8, 1), (6, 10, 0), (8, 12, 1), (10, 14, 0)]


def test_half_way_what_travels_in_two_parts_is_advanced(monkeypatch: pytest.MonkeyPatch) -> None:
    advanced: list[int] = []

    def story(node: Node) -> None:
        strategy = Strategy([DiLoCoRecipe(OUTER, 6, fragments=2, delay=5)]).bind(
            ModelLocal([Tiny()]), node
        )
        monkeypatch.setattr(
            "helpers.peers._Average.advance", lambda _: advanced.append(strategy.clock.steps)
        )
        for _ in range(12):
            strategy.after()

    World(Script(1)).run(story)
    # Rounds open after steps 1, 4, 7, 10 and close five steps later.
    assert advanced == [4, 7, 10]
