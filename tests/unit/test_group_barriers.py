"""The ranks of one group meet in every barrier of a step, or none of them does.

The real `Closer` runs once for each rank, on the plan that the rank is dealt; what is compared is
how often each rank asks the group's manager server for the others' word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from torchft.closing import Closer
from torchft.errors import HealError
from torchft.ledger import Ledger
from torchft.peers import Place
from torchft.progress import Progress
from torchft.step import Options, Plan, WorldSizeMode, plan_step
from torchft.transaction import Transaction

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


@dataclass
class Rank:
    """One rank of a group; `heals` says whether the state it is given can be fetched."""

    number: int
    heals: bool
    meetings: list[bool] = field(default_factory=list)

    def should_commit(self, rank: int, step: int, yes: bool, timeout: timedelta) -> bool:
        """The manager server's answer, where all others say yes."""
        assert rank == self.number
        self.meetings.append(yes)
        return yes

    def lives_through(self, plan: Plan, member: Member, place: Place) -> None:
        """One step, from its heal to its vote."""
        transaction = Transaction(Ledger(), lambda _: None)
        transaction.plan = plan
        transaction.finish_forming()
        closer = self._closer(Progress(fresh=member.fresh, step=member.step))
        if place is Place.AFTER:
            closer.heal(transaction, plan, SECOND)
        if plan.opening and place is Place.AFTER:
            closer.close_without_step(transaction, plan, SECOND)
        else:
            closer.close(transaction, plan, SECOND)

    def _closer(self, progress: Progress) -> Closer:
        def load(transaction: Transaction) -> None:
            assert transaction.plan is not None
            if transaction.plan.donor is not None and not self.heals:
                transaction.report(HealError("the donor is gone"))

        nothing: Any = SimpleNamespace(
            finish=lambda *_: None, closed=lambda *_, **__: None, say=lambda *_: None
        )
        group: Any = SimpleNamespace(
            client=self, rank=self.number, world_size=RANKS, replica_id="g:1"
        )
        return Closer(
            group=group,
            communicator=nothing,
            options=OPTIONS,
            ledger=Ledger(),
            log=nothing,
            progress=progress,
            load_staged=load,
            withdraw=lambda _: None,
            bytes_offered=lambda: 0,
        )


@given(MEMBERS, st.integers(0, 3), st.sampled_from(Place), st.tuples(*[st.booleans()] * RANKS))
def test_all_ranks_of_a_group_meet_in_every_barrier_or_none(
    members: list[Member], own: int, place: Place, heals: tuple[bool, ...]
) -> None:
    own %= len(members)
    ranks = [Rank(number, can) for number, can in enumerate(heals)]
    for rank in ranks:
        quorum = deal(members, own, rank.number)
        plan = plan_step(quorum, OPTIONS, place=place, configured=None, allow_heal=True)
        rank.lives_through(plan, members[own], place)
    assert len({len(rank.meetings) for rank in ranks}) == 1, [rank.meetings for rank in ranks]


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
