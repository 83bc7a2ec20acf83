"""Several steps open at once: who closes them, who was lost in them, and what a heal replaces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.steps import a_context, lone_step, parts
from torch.distributed import Work

from torchft.errors import CollectiveError, PhaseError, SettingsError
from torchft.manager.peers import ManagerPeers
from torchft.manager.plan import Phase, Plan
from torchft.manager.queue import Steps
from torchft.manager.step import Step

MEMBERS = ("a", "b", "c")


def plan(*members: str, heals: bool = False) -> Plan:
    return Plan(
        quorum_id=1,
        members=members or MEMBERS,
        replica_rank=0,
        step=4,
        store_address="",
        reconfigure=False,
        participating=tuple(range(len(members or MEMBERS))),
        donor=None,
        serves=(),
        healing=(1,) if heals else (),
        anyone_heals=heals,
        fresh=frozenset(),
        bootstrap=False,
        final_sync=False,
        reference=0,
    )


class Awaited(Work):
    """An average that knows whether somebody waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.waits += 1
        return True

    def report(self) -> None:
        """It is finite."""


class World(Steps):
    """The steps of a rank that is alone in its group, whose quorums form at once."""

    def __init__(self) -> None:
        self.context = a_context()
        self.votes: list[bool] = []
        super().__init__(*parts(self.context, self))

    def should_commit(self, rank: int, step: int, yes: bool, timeout: timedelta) -> bool:
        """The manager server's answer."""
        self.votes.append(yes)
        return yes

    def opened(self, *members: str) -> Step:
        step = self._next()
        step.known_plan = plan(*members)
        step.finish_forming()
        average: Any = Awaited()
        step.averages.append(average)
        return self.take()


@pytest.fixture
def donor() -> Iterator[World]:
    world = World()
    yield world
    world.shutdown()


@pytest.fixture
def steps() -> Iterator[World]:
    world = World()
    yield world
    world.shutdown()


def test_a_step_that_was_taken_leaves_the_manager_free_to_begin_another(steps: World) -> None:
    first = steps.opened()
    assert steps.phase is Phase.IDLE
    second = steps.opened()
    assert steps.close(first) and steps.close(second)
    assert steps.votes == [True, True]
    with pytest.raises(PhaseError, match="no step is open"):
        steps.close(first)


def test_a_step_that_lost_a_member_fails_and_one_that_lost_none_does_not(steps: World) -> None:
    before = steps.opened()
    steps.meet(plan("a", "c"))
    with_less = steps.opened("a", "c")
    steps.meet(plan("a", "c", "d"))
    error = before.error
    assert error is not None and str(error) == "b left while the step was open"
    assert not steps.close(before)
    assert steps.close(with_less)


def test_a_member_that_started_anew_is_another_one(steps: World) -> None:
    step = steps.opened("a:1", "b:1")
    steps.meet(plan("a:1", "b:2"))
    assert step.error is not None
    assert isinstance(step.error.original_exception, CollectiveError)


@pytest.mark.parametrize("heals", [True, False])
def test_before_anybody_heals_what_is_open_is_complete(steps: World, heals: bool) -> None:
    both = steps.opened(), steps.opened()
    steps.meet(plan(heals=heals))
    averages: list[Any] = [average for step in both for average in step.averages]
    assert [average.waits for average in averages] == [heals, heals]


def test_a_heal_replaces_what_is_open_by_what_the_donor_has_open(
    steps: World, donor: World
) -> None:
    theirs, spoilt = donor.opened(), donor.opened()
    spoilt.report_error(RuntimeError("the network broke"))
    mine = steps.opened()
    with steps.replaced_by_heal(lone_step()):
        good, bad = (steps.take_over(**step.carried()) for step in (theirs, spoilt))
    assert mine.phase is Phase.IDLE and mine.superseded
    assert not bad.superseded
    assert good.plan == replace(plan(), replica_rank=-1)
    assert not good.plan.participates
    assert steps.close(good)
    assert str(bad.error) == "the network broke"
    assert not bad.broken, "nobody waits for it in there"
    assert not steps.close(bad)


def test_the_step_in_which_a_heal_came_goes_on_when_it_was_taken_before(
    steps: World, donor: World
) -> None:
    theirs, earlier, mine = donor.opened(), steps.opened(), steps.opened()
    with steps.replaced_by_heal(mine):
        taken_over = steps.take_over(**theirs.carried())
    assert [earlier.phase, taken_over.phase, mine.phase] == [Phase.IDLE, Phase.OPEN, Phase.OPEN]
    assert not mine.superseded
    assert steps.close(taken_over)
    assert steps.close(mine)


def test_a_round_of_an_older_donor_which_counts_its_groups_is_taken_over(
    steps: World, donor: World
) -> None:
    carried = donor.opened().carried()
    named = {**carried, "counted": carried["participating"]}
    del named["participating"]
    steps.opened()
    manager: Any = SimpleNamespace(steps=steps)
    with steps.replaced_by_heal(lone_step()):
        taken_over = ManagerPeers(manager).take_over(named)
    assert taken_over.carried() == carried
    assert taken_over.close()


def test_a_step_that_still_forms_is_not_asked_who_is_in_it(steps: World) -> None:
    forming = steps._next()
    steps.take()
    steps.meet(plan(heals=True))
    assert not forming.failed
    forming.failure = RuntimeError("the test is over")
    forming.finish_forming()


def test_a_heal_that_cannot_be_loaded_leaves_open_what_was(steps: World) -> None:
    mine = steps.opened()
    with pytest.raises(KeyError), steps.replaced_by_heal(lone_step()):
        steps.take_over(**mine.carried())
        raise KeyError
    assert not mine.superseded
    assert steps.close(mine)


def test_an_error_of_a_closed_step_is_nobodys(steps: World) -> None:
    aborted: list[str] = []
    steps.context.group.pg.abort = lambda: aborted.append("aborted")  # type: ignore[method-assign]
    first = steps.opened()
    steps.close(first)
    second = steps.opened()
    first.report_error(RuntimeError("too late"))
    assert not aborted
    second.report_error(RuntimeError("in time"))
    assert aborted


@pytest.mark.parametrize("what", ["allreduce", "ordered_mean", "allgather"])
def test_a_sparse_tensor_is_refused_before_anything_is_sent(what: str) -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(SettingsError, match=rf"{what} of a sparse tensor of shape \(3, 3\)"):
        getattr(lone_step(), what)(sparse)
