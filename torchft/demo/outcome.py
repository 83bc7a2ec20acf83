"""From what a run left (lives, records, last words) to its summary."""

from __future__ import annotations

from collections.abc import Sequence

from torchft.demo.final_report import FinalReport
from torchft.demo.summary import GroupResult, KillResult
from torchft.launch.accounts import TimeAccount, WorkerTrace, account
from torchft.launch.events import short
from torchft.launch.group import Group, Life
from torchft.launch.monitor import GroupMonitor, RunMonitor

__all__ = ["group_result", "kill_result"]


def group_result(group: Group, watch: GroupMonitor, endings: Sequence[FinalReport]) -> GroupResult:
    """What became of one group; `endings` are its own."""
    return GroupResult(
        number=group.number,
        codes=[life.code for life in group.lives],
        committed=watch.committed,
        discarded=[short(record.why or "") for record in watch.discarded],
        bytes_sent=watch.bytes_sent,
        endings=endings,
        account=_account(group, watch, endings),
    )


def _account(group: Group, watch: GroupMonitor, endings: Sequence[FinalReport]) -> TimeAccount:
    if not group.lives:
        return TimeAccount(wall_s=0.0, seconds={})
    traces = [(life, _workers(life, watch)) for life in group.lives]
    lead = next((final_report for final_report in endings if final_report.group_rank == 0), None)
    if lead is not None and traces[-1][1]:
        # A worker's last word is later than its last record.
        last = traces[-1][1][-1]
        traces[-1][1][-1] = WorkerTrace(
            born=last.born, last_word=lead.t_monotonic, ledger=lead.ledger
        )
    return account(traces)


def _workers(life: Life, watch: GroupMonitor) -> list[WorkerTrace]:
    assert life.ended is not None
    return watch.workers(life.spawned, life.killed or life.ended)


def kill_result(group: Group, watch: RunMonitor, killed_id: str) -> KillResult | None:
    """What followed the kill of `group`, whose life was called `killed_id`; None: no kill."""
    killed = next((life.killed for life in group.lives if life.killed is not None), None)
    if killed is None:
        return None
    before = [r for r in watch.groups[group.number].records if r.replica_id == killed_id]
    next_commit = watch.first_without(killed_id, killed)
    full_again = watch.first_full(next_commit) if next_commit is not None else None
    return KillResult(
        group=group.number,
        step=before[-1].step + before[-1].committed if before else 0,
        next_commit_s=None if next_commit is None else next_commit - killed,
        full_again_s=None if full_again is None else full_again - killed,
    )
