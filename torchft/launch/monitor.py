"""What the groups of a run have reported: their step records, read as they are written.

A group's file holds the records of all its ranks and lives. Rank 0 speaks for the group; every
rank's bytes are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torchft.launch.accounts import WorkerTrace
from torchft.launch.processes import born_at
from torchft.records import StepRecord, StepRecordsReader

__all__ = ["GroupMonitor", "RunMonitor", "group_of"]


def group_of(replica_id: str) -> str:
    """The group's name, without the suffix of one start."""
    return replica_id.partition(":")[0]


class GroupMonitor:
    """One group's records. `born_at` says when a process was created, None if it is unknown."""

    def __init__(
        self, number: int, path: Path, *, born_at: Callable[[int], float | None] = born_at
    ) -> None:
        self.number = number
        self.records: list[StepRecord] = []
        """Of rank 0, in order, of all lives."""
        self.discarded: list[StepRecord] = []
        """Those of them that were not committed."""
        self.first_of: dict[str, StepRecord] = {}
        """Replica id → the first record of that process, in their order."""
        self.bytes_sent = 0
        """Payload bytes that all ranks of the group handed to the wire."""
        self._reader = StepRecordsReader(path)
        self._born_at = born_at
        self._births: dict[str, float] = {}

    def poll(self) -> list[StepRecord]:
        """Read what is new; returns the new records of rank 0.

        Raises:
            RecordsError: the file holds something else.
        """
        new = self._reader.poll()
        self.bytes_sent += sum(record.bytes_sent for record in new)
        leading = [record for record in new if record.group_rank == 0]
        for record in leading:
            self.add(record)
        return leading

    def add(self, record: StepRecord) -> None:
        """Take in one more event of the group's rank 0."""
        self.records.append(record)
        if not record.committed:
            self.discarded.append(record)
        if record.replica_id not in self.first_of:
            self.first_of[record.replica_id] = record
            self._remember_birth(record)

    def _remember_birth(self, record: StepRecord) -> None:
        """Read at the first record of a process: later it may be gone, and /proc with it."""
        born = self._born_at(record.extra.get("pid", 0))
        if born is None:  # gone already, or no /proc: its own ledger has to be believed
            born = record.t_monotonic - sum(record.ledger.values())
        self._births[record.replica_id] = born

    @property
    def last(self) -> StepRecord | None:
        """The latest record of rank 0."""
        return self.records[-1] if self.records else None

    @property
    def step(self) -> int:
        """Steps that the group has committed; a restarted group starts at 0 until it has healed."""
        return self.last.step + self.last.committed if self.last else 0

    @property
    def loss(self) -> float | None:
        """The loss that the latest record tells."""
        return self.last.extra.get("loss") if self.last else None

    @property
    def committed(self) -> int:
        """How many steps were committed, by all lives together."""
        return len(self.records) - len(self.discarded)

    def workers(self, since: float, until: float) -> list[WorkerTrace]:
        """Rank 0's processes that reported in that time, one after the other."""
        last: dict[str, StepRecord] = {}
        for record in self.records:
            if since <= record.t_monotonic <= until:
                last[record.replica_id] = record
        return [
            WorkerTrace(born=self._births[name], last_word=record.t_monotonic, ledger=record.ledger)
            for name, record in last.items()
        ]


class RunMonitor:
    """Follows all groups of a run by their events."""

    def __init__(self, groups: Sequence[GroupMonitor]) -> None:
        self.groups = list(groups)

    def poll(self) -> list[StepRecord]:
        """Read what is new in every file, in the order of the closes."""
        new = [record for group in self.groups for record in group.poll()]
        return sorted(new, key=lambda record: record.t_monotonic)

    def first_full(self, since: float = 0.0) -> float | None:
        """When a step with every group in it was first committed since then."""
        return self._first(since, lambda record: record.participants == len(self.groups))

    def first_without(self, replica_id: str, since: float) -> float | None:
        """When a quorum without that member first committed a step since then."""
        return self._first(since, lambda record: replica_id not in record.members)

    def _first(self, since: float, fits: Callable[[StepRecord], bool]) -> float | None:
        moments = [
            record.t_monotonic
            for group in self.groups
            for record in group.records
            if record.committed and record.t_monotonic >= since and fits(record)
        ]
        return min(moments, default=None)
