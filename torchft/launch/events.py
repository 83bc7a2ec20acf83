"""What is worth a line: who is in the quorum now, who heals, which step was discarded and why, and
that a run goes on past its last step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torchft.launch.monitor import group_of
from torchft.records import StepRecord

__all__ = ["Events", "short"]


class Events:
    """Tells each thing once, whichever group reports it first."""

    def __init__(self, groups: int, *, target: int) -> None:
        self._groups = groups
        self._target = target
        self._quorum_id = 0
        self._full = False
        self._known: set[str] = set()
        self._overtime = False

    def of(self, records: Iterable[StepRecord]) -> Iterator[str]:
        """What happened in these records, in their order."""
        for record in records:
            yield from self._quorum(record)
            yield from self._newcomer(record)
            if not record.committed:
                why = short(record.why or "")
                yield f"{group_of(record.replica_id)} discards step {record.step}: {why}"
            yield from self._membership(record)
            yield from self._last_step(record)

    def _newcomer(self, record: StepRecord) -> Iterator[str]:
        if record.replica_id in self._known:
            return
        self._known.add(record.replica_id)
        if record.step > 0:  # a process knows no step but from its peers
            spent = record.seconds.get("heal", 0.0)
            yield f"{group_of(record.replica_id)} has healed to step {record.step} in {spent:.2f} s"

    def _quorum(self, record: StepRecord) -> Iterator[str]:
        if record.quorum_id <= self._quorum_id:  # ids only rise: this one is told
            return
        self._quorum_id = record.quorum_id
        names = ", ".join(map(group_of, record.members))
        healing = len(record.members) - record.participants
        heals = f"; {healing} of them heals" if healing == 1 else ""
        heals = f"; {healing} of them heal" if healing > 1 else heals
        yield f"step {record.step}: a quorum of {names}{heals}"

    def _membership(self, record: StepRecord) -> Iterator[str]:
        full = record.participants == self._groups
        if full and not self._full:
            yield f"step {record.step}: all {self._groups} groups take part"
        self._full = full

    def _last_step(self, record: StepRecord) -> Iterator[str]:
        done, missing = record.step + 1, self._groups - record.participants
        if self._overtime or not record.committed or done < self._target or missing <= 0:
            return
        self._overtime = True
        yield (
            f"step {done} is done, and {missing} of {self._groups} groups not back yet: goes on "
            "until all take part, to end together"
        )


def short(why: str, limit: int = 160) -> str:
    """The beginning of a reason that may be a page."""
    line = " ".join(why.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
