"""Registered state: collected whole, loaded in order, never half."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections import deque
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

from torchft.checkpointing.snapshot import Snapshot
from torchft.errors import StateDictError
from torchft.manager.live_state import LiveState
from torchft.sharded import Sharding, mesh_of


@pytest.fixture
def state() -> LiveState:
    return LiveState(timedelta(seconds=0.05))


def test_keys_are_loaded_in_the_order_of_registration(state: LiveState) -> None:
    loaded: list[Any] = []
    state.register("model", loaded.append, lambda: "m")
    state.register("fragment", loaded.append, lambda: "f")
    state.load({"fragment": 2, "model": 1}, "step 3 of a")
    assert loaded == [1, 2]


def test_a_key_is_registered_once(state: LiveState) -> None:
    state.register("model", print, dict)
    with pytest.raises(AssertionError, match="model"):
        state.register("model", print, dict)


def test_the_payload_holds_the_users_states_and_the_managers(state: LiveState) -> None:
    state.register("model", print, lambda: {"w": 1})
    payload = state.collect(lambda: {"step": 3})
    assert payload == {"user": {"model": {"w": 1}}, "torchft": {"step": 3}}


def test_a_copy_has_tensors_of_its_own_and_the_versions_of_the_modules(state: LiveState) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    state.register("model", print, lambda: {"net": model.state_dict(), "seen": deque([1], 2)})
    state.offer_copies()
    user = state.collect(dict)["user"]["model"]
    model[0].weight.data.fill_(7)
    assert user["net"]["0.weight"].tolist() == [1, 1]
    assert user["net"]._metadata["0"] == {"version": 2}
    assert user["seen"] == deque([1], 2)


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
    with pytest.raises(StateDictError, match=r"step 3 of a has no state.*model"):
        state.load({}, "step 3 of a")


def test_a_load_that_fails_names_cause_key_and_donor(state: LiveState) -> None:
    def load(_: Any) -> None:
        raise KeyError("weight")

    state.register("model", load, dict)
    with pytest.raises(StateDictError, match=r"KeyError: 'weight' in .* of 'model', given step 3"):
        state.load({"model": {}}, "step 3 of a")


def test_state_that_cannot_travel_is_found_before_training(state: LiveState) -> None:
    state.register("model", print, lambda: {"w": torch.ones(2)})
    state.register("run", print, lambda: {"args": [Namespace(lr=1)]})
    with pytest.raises(StateDictError, match=r"state_dict\['args'\]\[0\]: a Namespace.*'run'"):
        state.verify(Snapshot.check, has_committed=False)


def test_state_that_an_optimizer_makes_later_is_looked_at_after_the_first_step(
    state: LiveState,
) -> None:
    made: dict[str, Any] = {}
    state.register("optimizer", print, lambda: made)
    state.verify(Snapshot.check, has_committed=False)
    made["lock"] = threading.Lock()
    state.verify(
        Snapshot.check, has_committed=False
    )  # the step was discarded: nothing can have changed
    with pytest.raises(StateDictError, match="lock"):
        state.verify(Snapshot.check, has_committed=True)


def test_state_is_looked_at_twice_and_then_no_more(state: LiveState) -> None:
    looks: list[Any] = []
    state.register("model", print, dict)
    for has_committed in (False, False, True, True, True):
        state.verify(looks.append, has_committed=has_committed)
    assert len(looks) == 2


def test_state_that_is_valid_only_later_is_a_warning(
    state: LiveState, caplog: pytest.LogCaptureFixture
) -> None:
    def not_yet() -> Any:
        raise RuntimeError("call setup() first")

    state.register("late", print, not_yet)
    state.verify(Snapshot.check, has_committed=False)
    assert "RuntimeError: call setup() first in state_dict of 'late'" in caplog.text


def test_state_is_not_looked_at_while_parameters_change(state: LiveState) -> None:
    looks: list[Any] = []
    state.register("model", print, dict)
    state.disallow_read()
    state.verify(looks.append, has_committed=False)
    assert looks == []


def test_moments_are_put_over_the_mesh_that_only_the_weights_tell(state: LiveState) -> None:
    """An optimizer that has not stepped has no moments yet."""
    here, theirs = (mesh_of(torch.arange(1), "cpu", ("fsdp",)) for _ in range(2))
    cut = Sharding((2,), (1,), (1,), ("fsdp",), (("shard", 0),))
    loaded: list[Any] = []
    state.register("model", loaded.append, lambda: {"w": cut.join(torch.zeros(2), here)})
    state.register("optimizer", loaded.append, dict)
    state.load({k: {"w": cut.join(torch.ones(2), theirs)} for k in ("model", "optimizer")}, "a")
    assert [one["w"].device_mesh is here for one in loaded] == [True, True]
