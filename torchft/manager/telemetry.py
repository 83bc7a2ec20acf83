"""What is said of a manager's steps: log lines, structured events, and the record of each step.

An event is said once, with replica, rank and step, by the logger `torchft.manager`: what went
wrong as a warning; who joins, leaves and heals as information, which is shown too, from rank 0,
where a program has not set up logging. The structured loggers `torchft_quorums`, `torchft_commits`
and `torchft_errors` carry the same facts as fields of the log record, for programs: only handlers
that are given to them get these.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from torchft import settings
from torchft.best_effort import BestEffort
from torchft.errors import SettingsError
from torchft.ledger import Ledger, spent_between
from torchft.manager.group import ReplicaGroup
from torchft.manager.plan import Plan
from torchft.records import StepRecord, StepRecords

if TYPE_CHECKING:
    from torchft.manager.step import Step

__all__ = ["StepLog", "changes", "same_names"]

_log = logging.getLogger("torchft.manager")
_quorums = logging.getLogger("torchft_quorums")
_commits = logging.getLogger("torchft_commits")
_errors = logging.getLogger("torchft_errors")
for _structured in (_quorums, _commits, _errors):
    if not _structured.handlers:
        _structured.addHandler(logging.NullHandler())
        _structured.propagate = False


def _nobody_chose() -> bool:
    """Whether this program has not set up logging: then Python itself shows only warnings."""
    return _log.level == logging.NOTSET and not _log.hasHandlers()


def changes(before: Sequence[str], members: Sequence[str]) -> str:
    """Members by their groups' names, and who of them is new and who has left."""
    came = [_name(one) for one in members if before and one not in before]
    left = [_name(one) for one in before if one not in members]
    parts = [", ".join(map(_name, members))]
    parts += [f"new: {', '.join(came)}"] if came else []
    parts += [f"gone: {', '.join(left)}"] if left else []
    return "; ".join(parts)


def same_names(members: Sequence[str]) -> list[list[str]]:
    """The members that share the name of their group with another one, by that name."""
    by_name: dict[str, list[str]] = {}
    for member in members:
        if ":" in member:
            by_name.setdefault(_name(member), []).append(member)
    return [same for same in by_name.values() if len(same) > 1]


def _name(replica_id: str) -> str:
    """The group's, without the suffix of this start."""
    return replica_id.rpartition(":")[0] or replica_id


_SAY_AWAY_S = 30.0
"""How often it is said that the lighthouse is away."""


class StepLog:
    """Writes the log lines and step records of one manager."""

    def __init__(self, group: ReplicaGroup, ledger: Ledger) -> None:
        self._group = group
        self._ledger = ledger
        self._where = f"{group.name or group.replica_id}/{group.rank}"
        self._quorum_id: int | None = None
        self._members: tuple[str, ...] = ()
        self._path = settings.text(settings.STEP_RECORDS)
        self._records: StepRecords | None = None
        self._try = BestEffort(f"the step record ({settings.STEP_RECORDS})", self._warn)
        if self._path:
            self._try.first(self._opened)
        self._spent_until_last: dict[str, float] = {}
        self._said_away = -math.inf
        self._notes: dict[str, Any] = {}
        """The user's, for the next record. Noted also between steps, as LocalSGD's loop has to."""

    def say(self, level: int, step: int, message: str, *values: object) -> None:
        """One line, such as `[group_0/0 - step 12] healed from …`."""
        line = f"[{self._where} - step {step}] {message}"
        if _log.isEnabledFor(level):
            _log.log(level, line, *values)
        elif level >= logging.INFO and self._group.rank == 0 and _nobody_chose():
            print(line % values, file=sys.stderr, flush=True)

    def quorum(self, plan: Plan, step: int) -> None:
        """Say who takes part, and who came and left, when that changed."""
        if plan.quorum_id == self._quorum_id:
            return
        before, self._members = self._members, plan.members
        self._quorum_id = plan.quorum_id
        self.say(logging.INFO, step, "quorum %d: %s", plan.quorum_id, changes(before, plan.members))
        if not before and len(plan.members) == 1 and step == 0:
            self.say(
                logging.WARNING,
                step,
                "starts at step 0, alone: no other group is there to heal from. If this job has "
                "trained before, load its checkpoint",
            )
        for same in same_names(plan.members):
            self.say(
                logging.WARNING,
                step,
                "several processes train under the name of one group (%s), on the same share of "
                "the data: give each group a name of its own, or stop the one too many",
                ", ".join(same),
            )
        _quorums.info("quorum %d", plan.quorum_id, extra=self._labels(step))

    def lighthouse_away(self, step: int, left: timedelta, error: Exception) -> None:
        """Say once in a while, on one rank, that the group waits for it, for at most `left`."""
        now = time.monotonic()
        if self._group.rank != 0 or now - self._said_away < _SAY_AWAY_S:
            return
        self._said_away = now
        self.say(
            logging.WARNING,
            step,
            "no quorum from the lighthouse: waiting for it with all state, for up to %.0f s more "
            "(%s): %s",
            left.total_seconds(),
            settings.LIGHTHOUSE_TIMEOUT_SEC,
            error,
        )

    def error(self, step: int, error: Exception) -> None:
        """Log the error that discards this step."""
        kind = type(error).__name__
        self.say(logging.WARNING, step, "%s: %s; the step is discarded", kind, error)
        _errors.warning("%s", error, extra={**self._labels(step), "error": type(error).__name__})

    def closed(
        self,
        step: Step,
        plan: Plan,
        *,
        number: int,
        committed: bool,
        why: str | None,
        sent: int,
        received: int,
    ) -> None:
        """Record that the step called `number` was voted on; bytes are those of this step."""
        if _commits.isEnabledFor(logging.INFO):
            word = "committed" if committed else "discarded"
            text = f"[{self._where} - step {number}] {word}"
            _commits.info(text, extra={**self._labels(number), "commit_result": committed})
        notes, self._notes = self._notes, {}
        if not self._path:
            return
        now = self._ledger.snapshot()
        record = StepRecord(
            t_monotonic=time.monotonic(),
            replica_id=self._group.replica_id,
            group_rank=self._group.rank,
            step=number,
            quorum_id=plan.quorum_id,
            members=plan.members,
            participants=len(plan.participating),
            committed=committed,
            why=why,
            bytes_sent=sent,
            bytes_received=received,
            seconds=spent_between(self._since(step, now), now),
            ledger=now,
            extra=notes,
        )
        self._try(lambda: self._opened().append(record))

    def note(self, extra: dict[str, Any]) -> None:
        """Keep names and values for the next record.

        Raises:
            SettingsError: JSON cannot hold a value; at the vote, where the record is written, that
                would be noticed too late.
        """
        for name, value in extra.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise SettingsError(f"note {name}={value!r} cannot be recorded: {error}") from error
        self._notes.update(extra)

    def _opened(self) -> StepRecords:
        if self._records is None:
            self._records = StepRecords(str(self._path))
        return self._records

    def _warn(self, message: str, *values: object) -> None:
        _log.warning(f"[{self._where}] {message}", *values)

    def _since(self, step: Step, now: dict[str, float]) -> dict[str, float]:
        """Since the step began, or since the last record of one that was open at the same time: no
        second is in two records."""
        last, self._spent_until_last = self._spent_until_last, now
        began = step.ledger_before
        return {bucket: max(began[bucket], last.get(bucket, 0.0)) for bucket in began}

    def close(self) -> None:
        """Close the file of step records, if there is one."""
        if self._records is not None:
            self._try.last(self._records.close)

    def _labels(self, step: int) -> dict[str, Any]:
        return {
            "job_id": settings.text(settings.JOB_ID, "unknown"),
            "replica_id": self._group.replica_id,
            "rank": self._group.rank,
            "quorum_id": self._quorum_id,
            "step": step,
        }
