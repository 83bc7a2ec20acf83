"""What is said of a manager's steps: log lines, structured events, and the record of each step.

An event is said once, with replica, rank and step. The structured loggers `torchft_quorums`,
`torchft_commits` and `torchft_errors` carry the same facts as fields of the log record, for
programs: they speak only to handlers that are added to them by name, so that no line is said twice.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from torchft import settings
from torchft.ledger import Ledger, spent_between
from torchft.records import StepRecord, StepRecords
from torchft.replica_group import ReplicaGroup
from torchft.step import Plan
from torchft.transaction import Transaction

__all__ = ["StepLog"]

_log = logging.getLogger("torchft.manager")
_quorums = logging.getLogger("torchft_quorums")
_commits = logging.getLogger("torchft_commits")
_errors = logging.getLogger("torchft_errors")
for _structured in (_quorums, _commits, _errors):
    if not _structured.handlers:
        _structured.propagate = False
        _structured.addHandler(logging.NullHandler())


class StepLog:
    """The voice of one manager."""

    def __init__(self, group: ReplicaGroup, ledger: Ledger) -> None:
        self._group = group
        self._ledger = ledger
        self._where = f"{group.name or group.replica_id}/{group.rank}"
        self._quorum_id: int | None = None
        path = settings.text(settings.STEP_RECORDS)
        self._records = StepRecords(path) if path else None
        self._spent_until_last: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        """The user's, for the next record. Noted also between steps, as LocalSGD's loop has to."""

    def say(self, level: int, step: int, message: str, *values: object) -> None:
        """One line, such as `[group_0/0 - step 12] healed from …`."""
        if _log.isEnabledFor(level):
            _log.log(level, f"[{self._where} - step {step}] {message}", *values)

    def quorum(self, plan: Plan, step: int) -> None:
        """Say who takes part, when that changed."""
        if plan.quorum_id == self._quorum_id:
            return
        self._quorum_id = plan.quorum_id
        names = ", ".join(member.partition(":")[0] for member in plan.members)
        self.say(logging.INFO, step, "quorum %d: %s", plan.quorum_id, names)
        _quorums.info("quorum %d", plan.quorum_id, extra=self._labels(step))

    def error(self, step: int, error: Exception) -> None:
        """Say what discards this step."""
        kind = type(error).__name__
        self.say(logging.WARNING, step, "%s: %s; the step is discarded", kind, error)
        _errors.warning("%s", error, extra={**self._labels(step), "error": type(error).__name__})

    def closed(
        self,
        transaction: Transaction,
        plan: Plan,
        *,
        step: int,
        committed: bool,
        why: str | None,
        sent: int,
        received: int,
    ) -> None:
        """`step` has been voted on: bytes are those of this step."""
        if _commits.isEnabledFor(logging.INFO):
            word = "committed" if committed else "discarded"
            _commits.info(word, extra={**self._labels(step), "commit_result": committed})
        notes, self.notes = self.notes, {}
        if self._records is None:
            return
        now = self._ledger.snapshot()
        self._records.append(
            StepRecord(
                t_monotonic=time.monotonic(),
                replica_id=self._group.replica_id,
                group_rank=self._group.rank,
                step=step,
                quorum_id=plan.quorum_id,
                members=plan.members,
                participants=len(plan.counted),
                committed=committed,
                why=why,
                bytes_sent=sent,
                bytes_received=received,
                seconds=spent_between(self._since(transaction, now), now),
                ledger=now,
                extra=notes,
            )
        )

    def _since(self, transaction: Transaction, now: dict[str, float]) -> dict[str, float]:
        """Since the step began, or since the last record of one that was open at the same time: no
        second is in two records."""
        last, self._spent_until_last = self._spent_until_last, now
        began = transaction.ledger_before
        return {bucket: max(began[bucket], last.get(bucket, 0.0)) for bucket in began}

    def close(self) -> None:
        """Close the file of records."""
        if self._records is not None:
            self._records.close()

    def _labels(self, step: int) -> dict[str, Any]:
        return {
            "job_id": settings.text(settings.JOB_ID, "unknown"),
            "replica_id": self._group.replica_id,
            "rank": self._group.rank,
            "quorum_id": self._quorum_id,
            "step": step,
        }
