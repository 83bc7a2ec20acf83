"""Step records of real processes, read as what happened to the nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from torchft.errors import SettingsError
from torchft.peers import Place
from torchft.records import StepRecord
from torchft.simulator.events import Dies, Discards, Event, Joins, Misses
from torchft.simulator.replay import events_of, heals_of, round_records_of, rounds_of
from torchft.simulator.round_records import HealRecord

NOTE = {"place": "AFTER", "recipe": 0, "restores": True, "kind": "ordered", "collectives": 1}


class Log:
    """Records of one round after the other. `a` is the first process of node 0, `A` its second."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self._committed = 0

    def round(
        self,
        inner_step: int,
        members: str,
        *,
        yes: str = "",
        no: str = "",
        heals: dict[str, int] | None = None,
        place: str = "AFTER",
    ) -> Log:
        """`yes` and `no` closed it; other members were killed in it."""
        for life in yes + no:
            extra: dict[str, Any] = {**NOTE, "inner_step": inner_step, "place": place}
            extra["round_bytes"] = 100
            if heals and life in heals:
                extra["healed_from"] = heals[life]
            self.records.append(
                StepRecord(
                    t_monotonic=0.0,
                    replica_id=_id(life),
                    group_rank=0,
                    step=self._committed,
                    quorum_id=len(self.records),
                    members=tuple(map(_id, members)),
                    participants=len(members),
                    committed=life in yes,
                    bytes_sent=100,
                    bytes_received=100 + (700 if heals and life in heals else 0),
                    extra=extra,
                )
            )
        self._set_quorum(len(yes + no))
        self._committed += bool(yes)
        return self

    def _set_quorum(self, closed: int) -> None:
        for at in range(len(self.records) - closed, len(self.records)):
            record = self.records[at]
            self.records[at] = StepRecord(**{**vars(record), "quorum_id": len(self.records)})


def _id(life: str) -> str:
    """`c` → node_0002, its first process; `C`: its second."""
    return f"node_{ord(life.lower()) - ord('a'):04d}:{life}"


STORIES: dict[str, tuple[Log, Sequence[Event]]] = {
    "all goes well": (Log().round(9, "abc", yes="abc").round(19, "abc", yes="abc"), []),
    "c is killed in a round and comes back": (
        Log()
        .round(9, "abc", yes="abc")
        .round(19, "abc", no="ab")
        .round(29, "ab", yes="ab")
        .round(39, "abC", yes="abC", heals={"C": 1}),
        [Dies(2, 19, in_round=True), Joins(2, 39, donor=1)],
    ),
    "c is killed between two rounds": (
        Log().round(9, "abc", yes="abc").round(19, "ab", yes="ab"),
        [Dies(2, 10)],
    ),
    "c is killed after it had done its part": (
        Log().round(9, "abc", yes="ab").round(19, "ab", yes="ab"),
        [Dies(2, 10)],
    ),
    "c is killed, and only a had all it needed": (
        Log().round(9, "abc", yes="a", no="b").round(19, "ab", yes="ab", heals={"b": 0}),
        [Misses(1, 9, donor=0), Dies(2, 10)],
    ),
    "a round fails, though nobody is lost": (
        Log().round(9, "abc", no="abc").round(19, "abc", yes="abc"),
        [Discards(9)],
    ),
    "c comes later": (
        Log().round(9, "ab", yes="ab").round(19, "abc", yes="abc", heals={"c": 0}),
        [Joins(2, 19, donor=0)],
    ),
    "c cannot heal at first": (
        Log()
        .round(9, "ab", yes="ab")
        .round(19, "abc", yes="ab", no="c")
        .round(29, "abc", yes="abc", heals={"c": 1}),
        [Joins(2, 29, donor=1)],
    ),
    "c is killed while it comes back": (
        Log().round(9, "abc", no="ab").round(19, "abC", no="ab").round(29, "ab", yes="ab"),
        [Dies(2, 9, in_round=True), Discards(19)],
    ),
    "c comes back, is killed before it could heal, and nobody was waiting for it": (
        Log().round(9, "abc", no="ab").round(19, "abC", yes="ab", no="C").round(29, "ab", yes="ab"),
        [Dies(2, 9, in_round=True)],
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_what_happened_is_read_from_who_was_there_and_who_said_what(name: str) -> None:
    log, expected = STORIES[name]
    assert events_of(log.records) == expected


def test_records_may_come_in_any_order() -> None:
    log, expected = STORIES["c is killed in a round and comes back"]
    assert events_of(log.records[::-1]) == expected


def test_records_of_something_else_are_refused() -> None:
    record = StepRecord(
        t_monotonic=0.0,
        replica_id="group_0:a",
        group_rank=0,
        step=7,
        quorum_id=1,
        members=("group_0:a",),
        participants=1,
        committed=True,
    )
    with pytest.raises(SettingsError, match=r"step 7 of group_0:a has no inner_step"):
        events_of([record])


def test_rounds_are_those_of_a_simulation_with_what_was_counted() -> None:
    log = Log().round(9, "ab", yes="ab").round(19, "abc", yes="abc", heals={"c": 1})
    first, second = round_records_of(rounds_of(log.records))
    assert (first.step, first.place, first.members) == (9, Place.AFTER, (0, 1))
    assert (second.members, second.counted, second.committed) == ((0, 1, 2), (0, 1), True)
    assert second.bytes_per_node == {0: 100, 1: 100, 2: 100}
    assert heals_of(rounds_of(log.records)) == [HealRecord(19, 2, 1, 700)]


def test_whoever_heals_before_its_gradients_is_counted() -> None:
    log = Log().round(9, "ab", yes="ab").round(10, "abc", yes="abc", heals={"c": 1}, place="BEFORE")
    assert round_records_of(rounds_of(log.records))[1].counted == (0, 1, 2)
