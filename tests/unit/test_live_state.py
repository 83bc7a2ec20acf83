"""Registered state: collected whole, loaded in order, never half."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from torchft.errors import HealError
from torchft.live_state import LiveState


@pytest.fixture
def state() -> LiveState:
    return LiveState(timedelta(seconds=0.05))


def test_keys_are_loaded_in_the_order_of_registration(state: LiveState) -> None:
    loaded: list[Any] = []
    state.register("model", loaded.append, lambda: "m")
    state.register("fragment", loaded.append, lambda: "f")
    state.load({"fragment": 2, "model": 1})
    assert loaded == [1, 2]


def test_a_key_is_registered_once(state: LiveState) -> None:
    state.register("model", print, dict)
    with pytest.raises(AssertionError, match="model"):
        state.register("model", print, dict)


def test_the_payload_holds_the_users_states_and_the_managers(state: LiveState) -> None:
    state.register("model", print, lambda: {"w": 1})
    payload = state.collect(lambda: {"step": 3})
    assert payload == {"user": {"model": {"w": 1}}, "torchft": {"step": 3}}


def test_a_reader_waits_while_parameters_change(state: LiveState) -> None:
    state.register("model", print, dict)
    state.disallow_read()
    state.disallow_read()
    with pytest.raises(TimeoutError):
        state.collect(dict)
    state.allow_read()
    state.allow_read()
    assert state.collect(dict) == {"user": {"model": {}}, "torchft": {}}


def test_a_donor_without_a_key_is_named(state: LiveState) -> None:
    state.register("model", print, dict)
    with pytest.raises(HealError, match="model"):
        state.load({})


def test_a_load_that_fails_is_a_failed_heal(state: LiveState) -> None:
    def load(_: Any) -> None:
        raise KeyError("weight")

    state.register("model", load, dict)
    with pytest.raises(HealError, match="'model' failed"):
        state.load({"model": {}})
