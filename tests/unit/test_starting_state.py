"""Which groups compare the state that they start from, what of it, and who is wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from torchft.errors import CollectiveError, MismatchError
from torchft.manager.live_state import LiveState
from torchft.manager.optimizer_state import optimizer_state
from torchft.manager.plan import Plan
from torchft.manager.registered import Registered
from torchft.manager.starting_state import (
    StartingState,
    announce,
    check,
    differs,
    digests,
    must_compare,
)

MEMBERS = ("group_0", "group_1", "group_2")


def plan(rank: int = 0, *, groups: int = 2, healing: tuple[int, ...] = (), fresh: Any = ()) -> Plan:
    return Plan(
        quorum_id=1,
        members=MEMBERS[:groups],
        replica_rank=rank,
        step=40,
        store_address="",
        reconfigure=True,
        participating=tuple(range(groups)),
        donor=None,
        serves=(),
        healing=healing,
        anyone_heals=bool(healing),
        fresh=frozenset(fresh),
        bootstrap=False,
        final_sync=False,
        reference=0,
    )


# ---------------------------------------------------------------------- who compares


def test_a_group_that_starts_compares_with_whoever_is_as_far() -> None:
    assert must_compare(plan(), starts=True)


def test_nothing_is_read_once_all_have_met() -> None:
    assert not must_compare(plan(), starts=False)


def test_a_group_alone_has_nobody_to_compare_with() -> None:
    assert not must_compare(plan(groups=1), starts=True)


def test_at_step_0_all_heal_from_one_and_compare_nothing() -> None:
    assert not must_compare(plan(healing=(1,), fresh=(0, 1)), starts=True)
    assert not must_compare(plan(1, healing=(1,), fresh=(0, 1)), starts=True)


def test_groups_that_train_compare_when_a_new_one_is_as_far_and_not_when_it_heals() -> None:
    assert must_compare(plan(groups=3, fresh=(2,)), starts=False)
    assert not must_compare(plan(groups=3, fresh=(2,), healing=(2,)), starts=False)


# ---------------------------------------------------------------------- who is wrong


def said(*groups: tuple[str, bool]) -> Mapping[int, Mapping[str, Any]]:
    return {rank: {"digest": one, "starts": new} for rank, (one, new) in enumerate(groups)}


def test_where_all_start_all_are_wrong_also_those_that_agree() -> None:
    three = said(("a", True), ("a", True), ("b", True))
    assert [differs(me, three) for me in range(3)] == [(2, True), (2, True), (0, True)]


def test_where_some_have_trained_they_are_right() -> None:
    three = said(("a", True), ("b", False), ("b", True))
    assert [differs(me, three) for me in range(3)] == [(1, True), (0, False), (0, False)]


def test_equal_states_are_no_difference() -> None:
    assert differs(0, said(("a", True), ("a", False))) is None


def together(
    states: list[dict[str, str] | None], starts: tuple[bool, ...] = (True, True)
) -> list[Exception | None]:
    """What `check` raises in each member; one without a state is of a version that has none."""
    store, announced = HashStore(), threading.Barrier(len(states))
    raised: list[Exception | None] = [None] * len(states)

    def member(rank: int, mine: dict[str, str] | None) -> Callable[[], None]:
        def run() -> None:
            if mine is not None:
                announce(store, mine, rank=rank, starts=starts[rank])
            announced.wait(10)
            try:
                if mine is not None:
                    check(store, mine, plan(rank, groups=len(states)))
            except Exception as error:
                raised[rank] = error

        return run

    threads = [threading.Thread(target=member(rank, one)) for rank, one in enumerate(states)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_both_are_told_the_first_key_that_differs() -> None:
    raised = together([{"model: a": "1", "model: b": "2"}, {"model: a": "1", "model: b": "3"}])
    assert [type(error) for error in raised] == [MismatchError, MismatchError]
    assert str(raised[0]).startswith(
        "group_0 starts at step 40 from other state than group_1: model: b is 2 here and 3 there."
    )
    assert "Start all groups from one checkpoint" in str(raised[1])


def test_the_group_that_has_trained_only_loses_the_step() -> None:
    raised = together([{"w": "1"}, {"w": "2"}], (False, True))
    assert [type(error) for error in raised] == [CollectiveError, MismatchError]
    assert "group_1 starts at step 40 from other state than group_0 has" in str(raised[0])
    assert str(raised[0]).endswith("In group_1, w is 2 here and 1 there")


def test_equal_groups_pass_and_a_member_of_an_older_version_is_not_waited_for() -> None:
    assert together([{"w": "1"}, {"w": "1"}, None], (True, True, True)) == [None, None, None]


# ---------------------------------------------------------------------- what is compared


def test_tensors_and_floats_count_and_counters_and_names_do_not() -> None:
    state = {"fragment": {"w": torch.ones(2), "lr": 0.1, "steps": 3, "name": "sgd", "on": True}}
    assert list(digests(state)) == ["fragment['w']", "fragment['lr']"]


def test_a_tensor_without_plain_bytes_is_left_out() -> None:
    assert digests({"a": torch.ones(2).to_sparse(), "b": torch.ones(2)}).keys() == {"b"}


def test_the_state_of_an_optimizer_has_the_names_of_its_parameters() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = dict(optimizer_state(optimizer, {id(model.weight): "weight"}))
    assert state["lr of group 0"] == 0.5
    assert state["momentum_buffer of weight"].shape == (1, 2)
    assert not any("bias" in name or "parameter 1" in name for name in state)


def test_without_names_the_parameters_of_an_optimizer_count_themselves() -> None:
    model = nn.Linear(2, 1)
    state = dict(optimizer_state(torch.optim.SGD(model.parameters(), lr=0.5)))
    assert state["parameter 0 of group 0"] is model.weight


def described(registered: Registered, *sources: Any) -> Mapping[str, Any]:
    starting = StartingState(LiveState(timedelta(seconds=1)), registered)
    for source in sources:
        starting.add(source)
    found = starting.described(plan())
    assert found is not None
    return found


def test_of_what_is_registered_parameters_and_optimizers_count_and_the_rest_may_differ() -> None:
    model = nn.BatchNorm1d(2)
    registered = Registered()
    objects = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
        "rng": torch.Generator(),
        "mine": nn.Linear(1, 1),
    }
    registered.add(objects, ["mine"], ())
    before = described(registered)
    model(torch.ones(3, 2))  # moves the buffers
    objects["rng"].manual_seed(5)
    nn.init.ones_(objects["mine"].weight)
    assert described(registered) == before
    nn.init.zeros_(model.weight)
    changed = [name for name, value in described(registered).items() if value != before[name]]
    assert changed == ["registered: model.weight"]


class Strategy:
    kind = "strategy"

    def equal_state(self) -> Mapping[str, Any]:
        return {"recipe 0": {"original_parameters": {"w": torch.ones(1)}}}


def test_beside_a_strategy_what_is_registered_may_differ_between_rounds() -> None:
    registered, strategy = Registered(), Strategy()
    registered.add({"model": nn.Linear(1, 1)}, (), ())
    names = list(described(registered, strategy))
    assert names == ["strategy: recipe 0['original_parameters']['w']"]


def test_the_first_meeting_ends_the_start_and_a_lone_quorum_does_not() -> None:
    starting = StartingState(LiveState(timedelta(seconds=1)), Registered())
    starting.compared(plan(groups=1))
    assert starting.described(plan()) is not None
    starting.compared(plan())
    assert starting.described(plan()) is None


@pytest.mark.parametrize("held", [True, False])
def test_a_source_that_nobody_holds_is_not_compared(held: bool) -> None:
    strategy = Strategy()
    starting = StartingState(LiveState(timedelta(seconds=1)), Registered())
    starting.add(strategy)
    if not held:
        del strategy
    assert bool(starting.described(plan())) is held
