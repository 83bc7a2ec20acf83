"""What a run came to: the figures as values first, then as text.

A run is good when every group ended by itself with exit code 0, every rank told a digest, and all
digests are equal. Nothing else decides the exit code; what is merely odd is said as a remark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchft.demo.final_report import FinalReport
from torchft.demo.run import RunSummary
from torchft.launch.accounts import TimeAccount
from torchft.ledger import Bucket

__all__ = ["GroupResult", "KillResult", "Summary"]

OTHER_LIMIT = 0.02
"""More of a group's wall time than this in `other` is remarked on."""

COLUMNS = ("launch", *(str(b) for b in Bucket if b is not Bucket.OTHER), "lost", "down", "exit")
"""The buckets of the table, in the order of a group's life; `other` comes last, as a share."""


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """One group at the end of the run."""

    number: int
    codes: Sequence[int | None]
    """Exit code of each life; the last one counts."""
    committed: int
    discarded: Sequence[str]
    """Why, for each step that was not committed."""
    bytes_sent: int
    endings: Sequence[FinalReport]
    """One a rank, if it got that far."""
    account: TimeAccount


@dataclass(frozen=True, kw_only=True)
class KillResult:
    """The kill and what followed, in seconds since it; None: it never came."""

    group: int
    step: int
    """The step that the victim had last committed."""
    next_commit_s: float | None
    """Until a quorum without the victim committed a step."""
    full_again_s: float | None
    """Until all groups, the victim's new life among them, took part in a committed step."""


@dataclass(frozen=True, kw_only=True)
class Summary(RunSummary):
    """A whole run of replica groups."""

    groups: Sequence[GroupResult]
    workers: int
    """Ranks in a group."""
    seed: int
    strategy: str
    kill: KillResult | None

    @property
    def digests(self) -> list[str]:
        """The digests of all ranks that ended by themselves."""
        return [final_report.digest for group in self.groups for final_report in group.endings]

    @property
    def equal(self) -> bool:
        """Whether every rank of every group ended, and all with the same state."""
        complete = len(self.digests) == len(self.groups) * self.workers
        return complete and len(set(self.digests)) == 1

    @property
    def began(self) -> bool:
        """Whether any group got as far as a step."""
        return any(group.committed or group.discarded or group.endings for group in self.groups)

    @property
    def good(self) -> bool:
        """Whether every group ended with exit code 0 and all digests are equal."""
        ended = all(group.codes and group.codes[-1] == 0 for group in self.groups)
        return self.trouble is None and ended and self.equal

    @property
    def steps(self) -> int:
        """How many steps the run has committed."""
        return max((e.step for group in self.groups for e in group.endings), default=0)

    @property
    def remarks(self) -> list[str]:
        """What is odd but not wrong."""
        found = []
        for group in self.groups:
            if group.account.other_share > OTHER_LIMIT:
                share = group.account.other_share
                found.append(f"group {group.number}: {share:.1%} of its time has no name")
            if not group.account.adds_up:
                found.append(
                    f"group {group.number}: the buckets miss its wall time by "
                    f"{group.account.unexplained_s:+.2f} s"
                )
        return found

    def lines(self) -> list[str]:
        """Describe the groups, the kill, where the time went, and the digests."""
        parts = [_headline(self), *_steps(self), *_kill(self), "", *_ledgers(self), ""]
        return [*parts, *_digests(self), *self.remarks]

    def text(self) -> str:
        """Describe the run in lines of text; in one if it was stopped before it began."""
        if self.stopped_by is not None and not self.began:
            return f"{self.trouble} before any group was up; logs: {self.folder}"
        return super().text()


def _headline(summary: Summary) -> str:
    ranks = f" of {summary.workers} workers" if summary.workers > 1 else ""
    return (
        f"{summary.strategy}, {len(summary.groups)} groups{ranks}, seed {summary.seed}: "
        f"{summary.steps} steps in {summary.wall_s:.1f} s"
    )


def _steps(summary: Summary) -> list[str]:
    lines = []
    for group in summary.groups:
        loss = f", held-out loss {group.endings[0].held_out_loss:.3f}" if group.endings else ""
        lines.append(
            f"  group {group.number}: {group.committed} committed, {len(group.discarded)} "
            f"discarded, {_size(group.bytes_sent)} sent{loss}"
        )
        lines += [f"    discarded: {why}" for why in group.discarded[:3]]
    return lines


def _kill(summary: Summary) -> list[str]:
    kill = summary.kill
    if kill is None:
        return ["  nobody was killed"]
    return [
        f"  group {kill.group} was killed after its step {kill.step}; seconds from the kill to the "
        f"others' next commit: {_seconds(kill.next_commit_s)}, "
        f"to full membership: {_seconds(kill.full_again_s)}"
    ]


def _ledgers(summary: Summary) -> list[str]:
    """A table of seconds: a row a bucket, a column a group."""
    accounts = [group.account for group in summary.groups]
    used = [name for name in COLUMNS if any(a.seconds.get(name, 0) >= 0.005 for a in accounts)]
    head = "".join(f"{f'group {group.number}':>10}" for group in summary.groups)
    rows = [f"  seconds      {head}"]
    rows += [_row(name, [a.seconds.get(name, 0.0) for a in accounts]) for name in used]
    rows += [_row("other", [a.seconds.get("other", 0.0) for a in accounts])]
    rows += [_row("sum", [sum(a.seconds.values()) for a in accounts])]
    rows += [_row("wall time", [a.wall_s for a in accounts])]
    rows += [f"  {'other, share':<13}" + "".join(f"{a.other_share:>10.2%}" for a in accounts)]
    return rows


def _row(name: str, seconds: Sequence[float]) -> str:
    return f"  {name:<13}" + "".join(f"{value:>10.2f}" for value in seconds)


def _digests(summary: Summary) -> list[str]:
    if summary.equal:
        return [f"digests: equal in all groups, {summary.digests[0][:16]}"]
    lines = ["digests: NOT EQUAL" if len(set(summary.digests)) > 1 else "digests: INCOMPLETE"]
    for group in summary.groups:
        told = ", ".join(f"rank {e.group_rank} {e.digest[:16]}" for e in group.endings)
        codes = ", ".join(map(str, group.codes))
        lines.append(f"  group {group.number}: {told or 'none'}; exit codes {codes}")
    return lines


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f}"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.1f} KiB"
