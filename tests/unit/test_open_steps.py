"""Several steps open at once: who closes them, who was lost in them, and what a heal replaces."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import Work

from torchft.errors import CollectiveError, PhaseError, SettingsError
from torchft.ledger import Ledger
from torchft.manager.open_step import Means, OpenStep
from torchft.manager.plan import Phase, Plan
from torchft.manager.queue import OpenSteps
from torchft.manager.transaction import Transaction

MEMBERS = ("a", "b", "c")


def plan(*members: str, heals: bool = False) -> Plan:
    return Plan(
        quorum_id=1,
        members=members or MEMBERS,
        replica_rank=0,
        step=4,
        store_address="",
        reconfigure=False,
        counted=tuple(range(len(members or MEMBERS))),
        donor=None,
        serves=(),
        healing=(1,) if heals else (),
        anyone_heals=heals,
        opening=False,
        settling=False,
        reference=0,
    )


class Closer:
    """Says yes to every step that has no error."""

    def __init__(self) -> None:
        self.closed: list[Transaction] = []

    def close(self, transaction: Transaction, plan: Plan, timeout: timedelta) -> bool:
        self.closed.append(transaction)
        return not transaction.failed


class Awaited(Work):
    """An average that knows whether somebody waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.waits += 1
        return True


class Steps(OpenSteps):
    """Those of a rank whose quorums form at once."""

    def __init__(self) -> None:
        self.closer: Any = Closer()
        nothing: Any = None
        super().__init__(Means(nothing, self.closer, timedelta(seconds=1)))

    def transaction(self) -> Transaction:
        return Transaction(Ledger(), lambda _: None)

    def opened(self) -> OpenStep:
        transaction = self.transaction()
        transaction.plan = plan()
        transaction.finish_forming()
        transaction.averages.append(Awaited())
        self.begin(transaction)
        return self.take()


def test_a_step_that_was_taken_leaves_the_manager_free_to_begin_another() -> None:
    steps = Steps()
    first = steps.opened()
    assert steps.phase is Phase.IDLE
    second = steps.opened()
    assert first.should_commit() and second.should_commit()
    assert steps.closer.closed == [first.transaction, second.transaction]
    with pytest.raises(PhaseError, match="no step is open"):
        first.should_commit()


def test_a_step_that_lost_a_member_fails_and_one_that_lost_none_does_not() -> None:
    steps = Steps()
    before = steps.opened()
    steps.before_heals(plan("a", "c"))
    with_less = steps.opened()
    with_less.transaction.plan = plan("a", "c")
    steps.before_heals(plan("a", "c", "d"))
    error = before.errored()
    assert error is not None and str(error) == "b left while the step was open"
    assert not before.should_commit()
    assert with_less.should_commit()


def test_a_member_that_started_anew_is_another_one() -> None:
    steps = Steps()
    step = steps.opened()
    step.transaction.plan = plan("a:1", "b:1")
    steps.before_heals(plan("a:1", "b:2"))
    assert isinstance(step.errored().original_exception, CollectiveError)  # type: ignore[union-attr]


@pytest.mark.parametrize("heals", [True, False])
def test_before_anybody_heals_what_is_open_is_complete(heals: bool) -> None:
    steps = Steps()
    both = steps.opened(), steps.opened()
    steps.before_heals(plan(heals=heals))
    waits = [average.waits for step in both for average in step.transaction.averages]
    assert waits == [heals, heals]


def test_a_heal_replaces_what_is_open_by_what_the_donor_has_open() -> None:
    donor, healed = Steps(), Steps()
    theirs, spoilt = donor.opened(), donor.opened()
    spoilt.report_error(RuntimeError("the network broke"))
    mine = healed.opened()
    with healed.healing(healed.transaction()):
        good, bad = (
            healed.take_over(healed.transaction(), **s.carried()) for s in (theirs, spoilt)
        )
    assert mine.phase is Phase.IDLE
    assert healed.are_running(bad.transaction)
    assert good.plan == replace(plan(), replica_rank=-1)
    assert not good.plan.participates
    assert good.should_commit()
    assert str(bad.errored()) == "the network broke"
    assert not bad.transaction.broken, "nobody waits for it in there"
    assert not bad.should_commit()


def test_the_step_in_which_a_heal_came_goes_on_when_it_was_taken_before() -> None:
    donor, healed = Steps(), Steps()
    theirs, earlier, mine = donor.opened(), healed.opened(), healed.opened()
    with healed.healing(mine.transaction):
        taken_over = healed.take_over(healed.transaction(), **theirs.carried())
    assert [earlier.phase, taken_over.phase, mine.phase] == [Phase.IDLE, Phase.OPEN, Phase.OPEN]
    assert healed.are_running(mine.transaction)
    assert taken_over.should_commit()
    assert mine.should_commit()


def test_a_step_that_still_forms_is_not_asked_who_is_in_it() -> None:
    steps = Steps()
    forming = steps.transaction()
    forming.ready.clear()
    steps.begin(forming)
    steps.take()
    steps.before_heals(plan(heals=True))
    assert not forming.failed


def test_a_heal_that_cannot_be_loaded_leaves_open_what_was() -> None:
    steps = Steps()
    mine = steps.opened()
    with pytest.raises(KeyError), steps.healing(steps.transaction()):
        steps.take_over(steps.transaction(), **mine.carried())
        raise KeyError
    assert steps.are_running(mine.transaction)
    assert mine.should_commit()


def test_an_error_of_a_closed_step_is_nobodys() -> None:
    steps = Steps()
    first = steps.opened()
    first.should_commit()
    steps.opened()
    assert not steps.are_running(first.transaction)


@pytest.mark.parametrize("what", ["allreduce", "ordered_mean", "allgather"])
def test_a_sparse_tensor_is_refused_before_anything_is_sent(what: str) -> None:
    steps = Steps()
    steps.begin(Transaction(Ledger(), lambda _: None))
    assert steps.last is not None
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(SettingsError, match=rf"{what} of a sparse tensor of shape \(3, 3\)"):
        getattr(steps.last, what)(sparse)
