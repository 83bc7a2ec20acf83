"""What real processes did, read from their step records, as events that a simulation repeats.

    result = run_processes(experiment)
    again = run_stacked(replace(experiment, events=events_of(result.records)))

Each process wrote a record for each round that it closed. Records of one round are found by their
inner step, quorum and manager's step. From who was a member, who says what, and who says nothing:

    nobody committed, a member says nothing          it died in the round
    nobody committed, all members say so             the round was discarded
    some committed, a member did not                 that one missed it, and healed later
    a process says nothing any more, others go on    it died after its last round
    the first round of a process that healed         it joined there, from that donor

Deaths and joins are exact to an inner step: with several rounds in one, the first of them counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torchft.errors import SettingsError
from torchft.peers import Place
from torchft.records import StepRecord
from torchft.simulator.events import Dies, Discards, Event, Joins, Misses
from torchft.simulator.round_records import HealRecord, RoundRecord

__all__ = ["RealRound", "events_of", "heals_of", "round_records_of", "rounds_of"]


@dataclass
class RealRound:
    """One round, as all that closed it saw it."""

    inner_step: int
    """In which it closed."""
    opened: int
    """The inner step in which it opened."""
    members: tuple[str, ...]
    """Replica ids, in rank order."""
    records: dict[str, StepRecord] = field(default_factory=dict)
    """By replica id."""

    @property
    def committed(self) -> list[str]:
        """The nodes for which the round committed."""
        return [one for one in self.members if one in self.records and self.records[one].committed]

    @property
    def silent(self) -> list[str]:
        """Members that did not live to close it."""
        return [one for one in self.members if one not in self.records]

    def donor_of(self, replica: str) -> int | None:
        """Which node `replica` healed from when this round opened."""
        record = self.records.get(replica)
        return None if record is None else record.extra.get("healed_from")


def rounds_of(records: Iterable[StepRecord]) -> list[RealRound]:
    """In the order in which they were opened.

    Raises:
        SettingsError: a record does not say its inner step.
    """
    rounds: dict[tuple[int, int, int], RealRound] = {}
    for record in records:
        step = record.extra.get("inner_step")
        if step is None:
            raise SettingsError(
                f"the record of step {record.step} of {record.replica_id} has no inner_step: only "
                "runs of the simulator's processes can be repeated"
            )
        key = (step, record.step, record.quorum_id)
        opened = record.extra.get("opened", step)
        one = rounds.setdefault(key, RealRound(step, opened, record.members))
        one.opened = min(one.opened, opened)  # one that took it over was not there then
        one.records[record.replica_id] = record
    return [rounds[key] for key in sorted(rounds)]


def events_of(records: Sequence[StepRecord]) -> list[Event]:
    """What happened to the nodes, for a simulation of the same experiment.

    Raises:
        SettingsError: records of something else than `run_processes`.
    """
    return _EventReader(rounds_of(records)).events()


class _EventReader:
    """Reads rounds one after the other. A life is a replica id: one process."""

    def __init__(self, rounds: Sequence[RealRound]) -> None:
        self._rounds = rounds
        self._opens: dict[str, list[int]] = defaultdict(list)
        """Life → the rounds in which it was a member."""
        for at, one in enumerate(rounds):
            for life in one.members:
                self._opens[life].append(at)
        self._closed: dict[str, int] = {}
        """Life → the last inner step in which it closed a round."""
        for one in rounds:
            for life in one.records:
                self._closed[life] = max(one.inner_step, self._closed.get(life, -1))
        self._up_to_date = set(rounds[0].members) if rounds else set()
        self._behind: set[str] = set()
        """Lives that missed a round: that they heal is known."""

    def events(self) -> list[Event]:
        """In the order of their steps."""
        found: list[Event] = []
        for at, one in enumerate(self._rounds):
            found += self._joined(one)
            found += self._missed(at, one) if one.committed else self._failed(at, one)
            found += self._gone_after(at, one)
        return sorted(found, key=lambda event: event.step)

    def _joined(self, one: RealRound) -> Iterator[Event]:
        for life in one.members:
            healed = one.donor_of(life) is not None or life in one.committed
            if not healed or life in self._up_to_date:
                continue  # it could not heal, or need not
            if life not in self._behind:
                yield Joins(_node_of(life), one.opened, one.donor_of(life))
            self._up_to_date.add(life)

    def _missed(self, at: int, one: RealRound) -> Iterator[Event]:
        for life in one.members:
            if life in one.records and life not in one.committed and life in self._up_to_date:
                self._up_to_date.remove(life)
                self._behind.add(life)
                yield Misses(_node_of(life), one.inner_step, self._next_donor(life, at))

    def _next_donor(self, life: str, at: int) -> int | None:
        later = (self._rounds[one].donor_of(life) for one in self._opens[life] if one > at)
        return next((donor for donor in later if donor is not None), None)

    def _failed(self, at: int, one: RealRound) -> Iterator[Event]:
        died = [life for life in one.silent if life in self._up_to_date]
        if not died:  # or only one that nobody knew yet
            yield Discards(one.inner_step)
        for life in died:
            is_last, closed = self._opens[life][-1] == at, self._closed.get(life, -1)
            if is_last and closed < one.opened:
                yield Dies(_node_of(life), one.opened, in_round=True)
                continue
            # It lived on after this round had opened, and died before it had arrived.
            yield Discards(one.inner_step)
            if is_last:
                yield Dies(_node_of(life), closed + 1)

    def _gone_after(self, at: int, one: RealRound) -> Iterator[Event]:
        """Members whose last round this is, while others open more."""
        if at + 1 == len(self._rounds):
            return
        for life in one.members:
            died_in_it = not one.committed and life in one.silent
            if self._opens[life][-1] == at and not died_in_it and life in self._up_to_date:
                last = one.inner_step if life in one.records else one.opened
                yield Dies(_node_of(life), last + 1)


def heals_of(rounds: Sequence[RealRound]) -> list[HealRecord]:
    """Which node got whose state, from the records of a run."""
    return [
        HealRecord(one.opened, _node_of(life), donor, _bytes_healed(one.records[life]))
        for one in rounds
        for life in one.members
        if (donor := one.donor_of(life)) is not None
    ]


def _bytes_healed(record: StepRecord) -> int:
    """What was received beside the round's collectives, which move as much in as out."""
    return record.bytes_received - record.extra["round_bytes"]


def round_records_of(rounds: Sequence[RealRound]) -> list[RoundRecord]:
    """As a simulation's, with the bytes that the processes counted."""
    return [_round_record(one) for one in rounds]


def _round_record(one: RealRound) -> RoundRecord:
    # Not that of one which took the round over: it had no part in the collectives.
    extra = next(one.records[life].extra for life in one.members if life in one.records)
    place = Place[extra["place"]]
    members = [life for life in one.members if place is Place.BEFORE or one.donor_of(life) is None]
    return RoundRecord(
        step=one.inner_step,
        place=place,
        kind=extra["kind"],
        members=tuple(map(_node_of, one.members)),
        counted=tuple(map(_node_of, members)),
        committed=bool(one.committed),
        bytes_per_node={
            _node_of(life): one.records[life].extra["round_bytes"]
            for life in one.members
            if life in one.records
        },
        collectives=extra["collectives"],
        recipe=extra["recipe"],
        restores=extra["restores"],
        delay=one.inner_step - one.opened,
    )


def _node_of(life: str) -> int:
    """`node_0007:…` → 7."""
    return int(life.partition(":")[0].rpartition("_")[2])
