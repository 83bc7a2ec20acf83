"""The plan of a step: who participates, who heals, what may follow what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.errors import PhaseError, SettingsError
from torchft.manager.plan import (
    FOLLOWS,
    Options,
    Phase,
    Plan,
    Why,
    WorldSizeMode,
    follow,
    has_tried_all_donors,
    objection,
)
from torchft.manager.plan import plan_step as plan
from torchft.peers import Place


@dataclass
class Quorum:
    """What the manager server answers to one rank; three groups at step 7 unless said otherwise."""

    replica_rank: int = 0
    replica_world_size: int = 3
    recovering_replica_ranks: list[int] = field(default_factory=list)
    fresh_replica_ranks: list[int] = field(default_factory=list)
    settling_replica_ranks: list[int] = field(default_factory=list)
    recover_dst_replica_ranks: list[int] = field(default_factory=list)
    recover_src_replica_rank: int | None = None
    recover_src_manager_address: str = ""
    quorum_id: int = 100
    store_address: str = "host:1"
    max_step: int = 7

    @property
    def heal(self) -> bool:
        return self.recover_src_replica_rank is not None

    @property
    def replica_ids(self) -> list[str]:
        return [f"group_{rank}:x" for rank in range(self.replica_world_size)]


def options(
    sync: bool = False, mode: WorldSizeMode = WorldSizeMode.DYNAMIC, least: int = 1
) -> Options:
    second = timedelta(seconds=1)
    return Options(least, sync, mode, second, second, second, None)


def make(quorum: Quorum, place: Place = Place.BEFORE, **kwargs: object) -> Plan:
    return plan(quorum, options(**kwargs), place=place, configured=100, allow_heal=True)  # type: ignore[arg-type]


def test_everybody_is_up_to_date_and_counted() -> None:
    made = make(Quorum(replica_rank=2))
    assert made.participating == (0, 1, 2)
    assert made.participating_rank == 2
    assert made.donor is None
    assert not made.reconfigure


def test_a_group_that_fell_behind_sends_zeros_while_it_heals_in_async_mode() -> None:
    made = make(Quorum(replica_rank=1, recovering_replica_ranks=[1], recover_src_replica_rank=0))
    assert made.participating == (0, 2)
    assert made.participating_rank is None
    assert made.donor is not None


def test_a_group_that_fell_behind_heals_first_and_is_counted_in_sync_mode() -> None:
    quorum = Quorum(replica_rank=1, recovering_replica_ranks=[1], recover_src_replica_rank=0)
    made = make(quorum, sync=True)
    assert made.participating == (0, 1, 2)


def test_a_new_group_heals_before_its_gradients_and_is_counted() -> None:
    quorum = Quorum(recovering_replica_ranks=[1], fresh_replica_ranks=[1])
    assert make(quorum).participating == (0, 1, 2)


def test_a_group_that_heals_after_its_inner_steps_has_nothing_to_contribute() -> None:
    quorum = Quorum(recovering_replica_ranks=[1], fresh_replica_ranks=[1])
    assert make(quorum, Place.AFTER, sync=True).participating == (0, 2)


def test_a_round_among_new_groups_only_is_an_opening() -> None:
    assert make(Quorum(fresh_replica_ranks=[0, 1, 2]), Place.AFTER).bootstrap
    assert not make(Quorum(fresh_replica_ranks=[0, 2]), Place.AFTER).bootstrap


def test_spares_are_not_counted() -> None:
    made = make(Quorum(replica_rank=2), mode=WorldSizeMode.FIXED_WITH_SPARES, least=2)
    assert made.participating == (0, 1)
    assert made.participating_rank is None


def test_nobody_heals_when_healing_is_not_allowed() -> None:
    quorum = Quorum(recovering_replica_ranks=[0], recover_src_replica_rank=1)
    made = plan(quorum, options(), place=Place.BEFORE, configured=None, allow_heal=False)
    assert made.donor is None
    assert made.serves == ()
    assert made.participating == (1, 2)


def test_the_one_who_was_there_before_is_right_when_models_differ() -> None:
    assert make(Quorum(fresh_replica_ranks=[0], recovering_replica_ranks=[1])).reference == 2
    assert make(Quorum(fresh_replica_ranks=[0, 1, 2], recovering_replica_ranks=[0])).reference == 1


def test_a_new_quorum_id_makes_a_new_process_group() -> None:
    assert make(Quorum(quorum_id=101)).reconfigure


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.sets(st.integers(0, n - 1), max_size=n - 1),
            st.sets(st.integers(0, n - 1)),
        )
    ),
    st.sampled_from(Place),
    st.booleans(),
    st.sampled_from(WorldSizeMode),
    st.integers(1, 4),
)
def test_all_members_of_a_quorum_count_the_same_groups(
    world: tuple[int, set[int], set[int]],
    place: Place,
    sync: bool,
    mode: WorldSizeMode,
    least: int,
) -> None:
    size, recovering, fresh = world
    plans = [
        make(
            Quorum(
                replica_rank=rank,
                replica_world_size=size,
                recovering_replica_ranks=sorted(recovering),
                fresh_replica_ranks=sorted(fresh),
            ),
            place,
            sync=sync,
            mode=mode,
            least=least,
        )
        for rank in range(size)
    ]
    assert len({made.participating for made in plans}) == 1
    assert len({made.reference for made in plans}) == 1
    ranks = [made.participating_rank for made in plans if made.participates]
    assert ranks == list(range(len(plans[0].participating)))


def test_a_vote_needs_an_open_step() -> None:
    with pytest.raises(PhaseError, match="start_quorum"):
        follow(Phase.IDLE, Phase.VOTING)


def test_nothing_follows_a_shutdown() -> None:
    assert FOLLOWS[Phase.CLOSED] == {Phase.CLOSED}
    with pytest.raises(PhaseError, match="make a new one"):
        follow(Phase.CLOSED, Phase.OPEN)


def test_a_step_that_was_never_voted_on_may_be_opened_again() -> None:
    assert follow(Phase.OPEN, Phase.OPEN) is Phase.OPEN


def test_objections_name_their_reason() -> None:
    assert objection(failed=False, participating=2, min_replica_size=2) is None
    assert objection(failed=True, participating=2, min_replica_size=2) is Why.ERROR
    assert objection(failed=False, participating=1, min_replica_size=2) is Why.TOO_FEW


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(SettingsError, match="min_replica_size=0"):
        options(least=0)


def leaves(plan: Plan, failed: Sequence[int], *, refused: bool = False) -> list[bool]:
    return [has_tried_all_donors(plan, so_often, refused=refused) for so_often in failed]


def test_a_counted_group_leaves_when_three_heals_and_every_donor_have_failed() -> None:
    heals = make(Quorum(recovering_replica_ranks=[0], fresh_replica_ranks=[0]))
    assert heals.donors == 2
    assert leaves(heals, (2, 3)) == [False, True]
    quorum = Quorum(replica_world_size=6, recovering_replica_ranks=[0], fresh_replica_ranks=[0])
    many = make(quorum)
    assert leaves(many, (4, 5)) == [False, True]


def test_a_group_that_costs_the_others_nothing_may_go_on_trying_to_heal() -> None:
    heals = make(Quorum(recovering_replica_ranks=[0], fresh_replica_ranks=[0]), Place.AFTER)
    assert leaves(heals, [100]) == [False]


def test_a_group_leaves_whose_donors_can_never_read_their_state() -> None:
    heals = make(Quorum(recovering_replica_ranks=[0], fresh_replica_ranks=[0]), Place.AFTER)
    assert leaves(heals, (2, 3), refused=True) == [False, True]
