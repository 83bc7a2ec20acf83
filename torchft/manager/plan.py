"""What one step will do, decided once from its quorum, without clock, socket or tensor.

A step is a transaction: *begin* (a quorum forms), *communicate*, *vote*, then *apply* or *discard*.
`Phase` says where it stands and `FOLLOWS` what may come next; `plan_step` turns a quorum into a
`Plan`: who participates, who heals whom and when; `objection` is this rank's vote.

Who participates, so that every group computes the same divisor from the same quorum:

    member of the quorum                                   gradients (BEFORE)   weights (AFTER)
    up to date                                             participates         participates
    new, in its first quorum                               participates         zeros
    heals, and does so before it computes gradients        participates         zeros
    heals while the step runs                              zeros                zeros
    beyond min_replica_size, with FIXED_WITH_SPARES        zeros                zeros
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Protocol

from torchft.arguments import check_integer
from torchft.checkpointing.transport import LIMIT, longest_s
from torchft.errors import PhaseError
from torchft.peers import Place

__all__ = [
    "FOLLOWS",
    "LEAST_TRIES",
    "Donor",
    "Options",
    "Phase",
    "Plan",
    "QuorumLike",
    "Why",
    "WorldSizeMode",
    "extract_trailing_digits",
    "follow",
    "global_ranks",
    "has_tried_all_donors",
    "objection",
    "plan_of_others",
    "plan_step",
]


class Phase(enum.Enum):
    """The phase in which the manager's step stands."""

    IDLE = "idle"
    OPEN = "open"
    VOTING = "voting"
    CLOSED = "shut down"


FOLLOWS: dict[Phase, frozenset[Phase]] = {
    Phase.IDLE: frozenset({Phase.OPEN, Phase.CLOSED}),
    # A step that is opened again was never voted on: it is dropped with all that it holds.
    Phase.OPEN: frozenset({Phase.OPEN, Phase.VOTING, Phase.CLOSED}),
    Phase.VOTING: frozenset({Phase.IDLE, Phase.CLOSED}),
    Phase.CLOSED: frozenset({Phase.CLOSED}),
}


def follow(phase: Phase, to: Phase) -> Phase:
    """The phase `to`, if it may follow `phase`.

    Raises:
        PhaseError: it may not; says what to call first.
    """
    if to in FOLLOWS[phase]:
        return to
    if phase is Phase.CLOSED:
        raise PhaseError("this manager is shut down: make a new one")
    if to is Phase.VOTING:
        raise PhaseError("no step is open: call start_quorum (or zero_grad of the Optimizer) first")
    raise PhaseError(f"the step is {phase.value}; it cannot become {to.value}")


class WorldSizeMode(enum.Enum):
    """How many of the groups in a quorum participate."""

    DYNAMIC = 0
    """All that are there."""
    FIXED_WITH_SPARES = 1
    """At most `min_replica_size`; the others are spares and contribute zeros."""


@dataclass(frozen=True)
class Options:
    """How a manager runs its steps."""

    min_replica_size: int
    """Fewer participating groups than this, and the step is discarded."""
    sync: bool
    """Quorums are waited for before the forward pass."""
    mode: WorldSizeMode
    timeout: timedelta
    """Of a collective, a transfer of state; a vote's follows from it (`torchft.timeouts`)."""
    quorum_timeout: timedelta
    connect_timeout: timedelta
    max_retries: int | None
    """Discarded steps in a row before it gives up; None: it never does."""
    check_finite: bool = True
    """NaN or infinity in an average discards the step."""
    lighthouse_timeout: timedelta = timedelta(hours=1)
    """How long a lighthouse that does not answer is waited for."""
    init_sync: bool = True
    """At step 0 every group starts from one group's state."""

    @property
    def heal_limit(self) -> timedelta:
        """A heal in which hardly anything moves is waited for so long."""
        return self.timeout * LIMIT

    def longest_heal(self, nbytes: int) -> timedelta:
        """A heal to a state of `nbytes` may take so long."""
        return timedelta(seconds=longest_s(self.heal_limit.total_seconds(), nbytes))

    def __post_init__(self) -> None:
        check_integer("min_replica_size", self.min_replica_size, least=1)
        if self.max_retries is not None:
            check_integer("max_retries", self.max_retries, least=0)


class QuorumLike(Protocol):
    """The fields of `coordination.QuorumResult` that a plan reads."""

    quorum_id: int
    replica_rank: int
    replica_world_size: int
    replica_ids: list[str]
    store_address: str
    max_step: int
    heal: bool
    recover_src_manager_address: str
    recover_src_replica_rank: int | None
    recover_dst_replica_ranks: list[int]
    recovering_replica_ranks: list[int]
    fresh_replica_ranks: list[int]
    settling_replica_ranks: list[int]


@dataclass(frozen=True)
class Donor:
    """The live group that this one heals from."""

    replica_rank: int
    manager_address: str


@dataclass(frozen=True)
class Plan:
    """One step, as all groups of its quorum agree on it."""

    quorum_id: int
    members: tuple[str, ...]
    """Replica ids in rank order."""
    replica_rank: int
    step: int
    """The last step that the members have committed: the one this round adds to."""
    store_address: str
    reconfigure: bool
    """The process group does not belong to this quorum id yet."""
    participating: tuple[int, ...]
    """Replica ranks whose contribution enters the averages, in order."""
    donor: Donor | None
    """Set when this group heals."""
    serves: tuple[int, ...]
    """Replica ranks that heal from this group."""
    healing: tuple[int, ...]
    """Replica ranks that are behind."""
    anyone_heals: bool
    """Some member heals: donors must not close the step before it has what it needs."""
    fresh: frozenset[int]
    """Replica ranks that are new, and have not been in a quorum since they started."""
    bootstrap: bool
    """All members are new: nobody has anything to contribute yet."""
    final_sync: bool
    """A member ends its run: in this round who is behind heals, and nothing is averaged."""
    reference: int
    """The replica rank whose model the others must match."""

    @property
    def participating_rank(self) -> int | None:
        """Position among the participating groups, None for a group that contributes zeros."""
        return self.participating.index(self.replica_rank) if self.participates else None

    @property
    def participates(self) -> bool:
        """Whether this group's contribution enters the averages."""
        return self.replica_rank in self.participating

    @property
    def level(self) -> list[int]:
        """Replica ranks that hold the state of this step, and so do not heal."""
        return [rank for rank in range(len(self.members)) if rank not in self.healing]

    @property
    def donors(self) -> int:
        """How many groups hold the state that the others heal to."""
        return len(self.level)

    @property
    def may_heal(self) -> bool:
        """Whether a rank of this group may heal: the same on all of its ranks, unlike `donor`.

        When all members are new, the rank that keeps its own state lies in one group for group
        rank 0 and in another for group rank 1, so some ranks of a group have a donor and some not.
        """
        return self.donor is not None or (self.bootstrap and self.anyone_heals)

    @property
    def name(self) -> str:
        """The replica id of this group in the quorum."""
        return self.members[self.replica_rank]


def plan_step(
    quorum: QuorumLike,
    options: Options,
    *,
    place: Place,
    configured: int | None,
    allow_heal: bool,
) -> Plan:
    """The plan that every group makes of the same quorum.

    `configured`: the quorum id that the process group was made for, None when there is none.
    """
    recovering = frozenset(quorum.recovering_replica_ranks)
    fresh = frozenset(quorum.fresh_replica_ranks)
    me, ranks = quorum.replica_rank, range(quorum.replica_world_size)

    def participates(rank: int) -> bool:
        if place is Place.AFTER:
            return rank not in recovering | fresh
        heals_first = options.sync or rank in fresh
        return rank not in recovering or (allow_heal and heals_first)

    participating = tuple(rank for rank in ranks if participates(rank))
    if options.mode is WorldSizeMode.FIXED_WITH_SPARES:
        participating = participating[: options.min_replica_size]
    heals = quorum.heal and allow_heal and quorum.recover_src_replica_rank is not None
    return Plan(
        quorum_id=quorum.quorum_id,
        members=tuple(quorum.replica_ids),
        replica_rank=me,
        step=quorum.max_step,
        store_address=quorum.store_address,
        reconfigure=quorum.quorum_id != configured,
        participating=participating,
        donor=_donor(quorum) if heals else None,
        serves=tuple(quorum.recover_dst_replica_ranks) if allow_heal else (),
        healing=tuple(sorted(recovering)),
        anyone_heals=bool(recovering) and allow_heal,
        fresh=fresh,
        bootstrap=len(fresh) == len(ranks),
        final_sync=bool(quorum.settling_replica_ranks),
        reference=_reference(ranks, recovering, fresh),
    )


def _donor(quorum: QuorumLike) -> Donor:
    assert quorum.recover_src_replica_rank is not None
    return Donor(quorum.recover_src_replica_rank, quorum.recover_src_manager_address)


def _reference(ranks: Sequence[int], recovering: frozenset[int], fresh: frozenset[int]) -> int:
    """Who is right when two groups differ: who was there before, else who is up to date."""
    for newcomers in (recovering | fresh, recovering, frozenset[int]()):
        for rank in ranks:
            if rank not in newcomers:
                return rank
    raise ValueError("a quorum has at least one member")


def plan_of_others(
    plan: Plan, *, quorum_id: int, members: Sequence[str], participating: Sequence[int]
) -> Plan:
    """The plan of a step that others opened before this group healed in `plan`: it has no part in
    its collectives, and closes it as they do."""
    return replace(
        plan,
        quorum_id=quorum_id,
        members=tuple(members),
        replica_rank=-1,
        reconfigure=False,
        participating=tuple(participating),
        donor=None,
        serves=(),
        healing=(),
        anyone_heals=False,
        fresh=frozenset(),
        bootstrap=False,
        final_sync=False,
    )


def extract_trailing_digits(s: str) -> int:
    """The number that `s` ends in, 0 if it ends in none: 12 of `replica_12`."""
    return int(s[len(s.rstrip("0123456789")) :] or 0)


def global_ranks(members: Sequence[str], group_rank: int, group_world_size: int) -> list[int]:
    """Ranks of the members that have `group_rank`, counted over all groups, where the name of each
    group ends in its number: 9 is rank 1 of four of `group_2`.

    Args:
        members: replica ids, each a name, a colon and a suffix.
        group_rank: in its group.
        group_world_size: how many ranks each group has.
    """
    numbers = [extract_trailing_digits(member.rpartition(":")[0]) for member in members]
    return [number * group_world_size + group_rank for number in numbers]


LEAST_TRIES = 3
"""So many heals must fail in a row before a group leaves: a donor may just have died."""


def has_tried_all_donors(plan: Plan, heals_failed: int, *, refused: bool) -> bool:
    """Whether a group must leave, after so many heals that failed in a row.

    One that does not participate in its step costs the others nothing and may go on trying, unless
    the last donor has `refused` since it cannot read its state, which another try does not mend.
    """
    return (plan.participates or refused) and heals_failed >= max(LEAST_TRIES, plan.donors)


class Why(enum.Enum):
    """Why a step was discarded, in a step record."""

    ERROR = "error"
    TOO_FEW = "too few groups participate"
    ANOTHER_RANK = "another rank of this group voted no"
    NOT_FINITE = "not finite"
    """NaN or infinity in an average, here or at another rank of this group, and nothing else."""


def objection(
    *, failed: bool, participating: int, min_replica_size: int, not_finite: bool = False
) -> Why | None:
    """What this rank has against committing; None: it votes to commit."""
    if failed and not not_finite:
        return Why.ERROR
    if participating < min_replica_size:
        return Why.TOO_FEW
    if failed:
        return Why.NOT_FINITE
    return None
