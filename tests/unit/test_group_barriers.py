"""The ranks of one group meet in every barrier of a step, or none of them does.

The real `Steps` run in a thread for each rank, on the plan that the rank is dealt, and asks the
group's manager server for the others' word: where some do so more often, they wait in vain.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.steps import a_context, parts
from hypothesis import given, settings
from hypothesis import strategies as st

from torchft.errors import HealError, NotFiniteError
from torchft.manager.plan import Options, Plan, WorldSizeMode, plan_step
from torchft.manager.progress import Progress
from torchft.manager.queue import Steps
from torchft.manager.step import Step
from torchft.peers import Place

SECOND = timedelta(seconds=1)
OPTIONS = Options(1, True, WorldSizeMode.DYNAMIC, SECOND, SECOND, SECOND, None)
RANKS = 3


@dataclass(frozen=True)
class Member:
    """A group, as it asks for a quorum."""

    step: int
    fresh: bool


MEMBERS = st.lists(st.builds(Member, st.integers(0, 2), st.booleans()), min_size=1, max_size=4)


def deal(members: list[Member], own: int, group_rank: int) -> Any:
    """What `lighthouse/quorum/src/assign.rs` tells the rank `group_rank` of the group `own`."""
    step = max(member.step for member in members)
    ranks = range(len(members))
    ahead = [rank for rank in ranks if members[rank].step == step]
    forced = [rank for rank in ranks if step == 0 and members[rank].fresh]
    pool = [rank for rank in ahead if rank not in forced] or ahead
    primary = pool[group_rank % len(pool)]
    heals = [r for r in ranks if members[r].step < step or (r in forced and r != primary)]
    donors = [rank for rank in ranks if rank not in heals]
    pairs = {to: donors[(group_rank + i) % len(donors)] for i, to in enumerate(heals)}
    return SimpleNamespace(
        quorum_id=1,
        replica_rank=own,
        replica_world_size=len(members),
        replica_ids=[f"group_{rank}" for rank in ranks],
        store_address="",
        max_step=step,
        heal=own in pairs,
        recover_src_manager_address="",
        recover_src_replica_rank=pairs.get(own),
        recover_dst_replica_ranks=[to for to, donor in pairs.items() if donor == own],
        recovering_replica_ranks=heals,
        fresh_replica_ranks=[rank for rank in ranks if members[rank].fresh],
        settling_replica_ranks=[],
    )


class Server:
    """The group's manager server: every rank's word, or none."""

    def __init__(self) -> None:
        self._said = [False] * RANKS
        self._barrier = threading.Barrier(RANKS, timeout=5)

    def all_say(self, rank: int, yes: bool) -> bool:
        self._said[rank] = yes
        self._barrier.wait()
        answer = all(self._said)
        self._barrier.wait()
        return answer


@dataclass
class Rank:
    """One rank of a group; `heals` says whether the state it is given can be fetched, `finite`
    whether its averages are."""

    number: int
    heals: bool
    server: Server
    finite: bool = True
    progress: Progress = field(default_factory=lambda: Progress(fresh=False))
    meetings: list[bool] = field(default_factory=list)

    def should_commit(self, rank: int, step: int, yes: bool, timeout: timedelta) -> bool:
        """The manager server's answer."""
        assert rank == self.number
        self.meetings.append(yes)
        return self.server.all_say(rank, yes)

    def lives_through(self, plan: Plan, member: Member, place: Place) -> None:
        """One step, from its heal to its vote."""
        self.progress = Progress(fresh=member.fresh, step=member.step)
        context = a_context(progress=self.progress)
        steps = Steps(*parts(context, self, rank=self.number, world_size=RANKS))
        steps._load = self._load  # type: ignore[method-assign]
        step = steps._next()
        step.known_plan = plan
        step.finish_forming()
        average: Any = SimpleNamespace(wait=lambda _: None, report=lambda: self._arrives(step))
        step.averages.append(average)
        try:
            if place is Place.AFTER:
                steps.heal(step)
            steps.close(step, SECOND, counts=not (plan.bootstrap and place is Place.AFTER))
        finally:
            steps.shutdown(wait=False)

    def _load(self, step: Step, plan: Plan) -> None:
        if plan.donor is not None and not self.heals:
            step.report(HealError("the donor is gone"))

    def _arrives(self, step: Step) -> None:
        if not self.finite and not step.failed:
            step.report(NotFiniteError("NaN"), local=True)


EACH = st.tuples(*[st.booleans()] * RANKS)


def live(
    members: list[Member], own: int, place: Place, heals: tuple[bool, ...], finite: tuple[bool, ...]
) -> list[Rank]:
    """One step of all ranks of the group `own`."""
    server = Server()
    ranks = [
        Rank(at, *of) for at, of in enumerate(zip(heals, [server] * RANKS, finite, strict=True))
    ]

    def one(rank: Rank) -> None:
        quorum = deal(members, own, rank.number)
        plan = plan_step(quorum, OPTIONS, place=place, configured=None, allow_heal=True)
        rank.lives_through(plan, members[own], place)

    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(one, ranks))
    return ranks


@settings(max_examples=60, deadline=None)
@given(MEMBERS, st.integers(0, 3), st.sampled_from(Place), EACH, EACH)
def test_all_ranks_of_a_group_meet_in_every_barrier_or_none(
    members: list[Member],
    own: int,
    place: Place,
    heals: tuple[bool, ...],
    finite: tuple[bool, ...],
) -> None:
    ranks = live(members, own % len(members), place, heals, finite)
    assert len({len(rank.meetings) for rank in ranks}) == 1, [rank.meetings for rank in ranks]
    assert len({rank.progress.commit_failures for rank in ranks}) == 1


@pytest.mark.parametrize(
    ("heals", "discarded", "skipped"), [((True,) * 3, 0, 1), ((True, True, False), 1, 0)]
)
def test_nan_in_the_shard_of_one_rank_is_no_failure_of_any_unless_another_has_one(
    heals: tuple[bool, ...], discarded: int, skipped: int
) -> None:
    behind = [Member(0, fresh=False), Member(1, fresh=False)]
    ranks = live(behind, 0, Place.BEFORE, heals, (False, True, True))
    for rank in ranks:
        assert (rank.progress.discarded, rank.progress.skipped) == (discarded, skipped)
        assert rank.meetings[-2:] == [rank.heals and rank.finite, rank.heals]


def test_ranks_of_a_new_group_of_which_only_some_have_a_donor() -> None:
    members = [Member(0, fresh=True)] * 2
    plans = [
        plan_step(
            deal(members, 0, rank), OPTIONS, place=Place.AFTER, configured=None, allow_heal=True
        )
        for rank in range(2)
    ]
    assert [plan.donor is not None for plan in plans] == [False, True]
    assert all(plan.may_heal for plan in plans)
