"""Groups train; one is killed and comes back. How long do the others stand still, and what is lost?

Three groups of one rank train a small model with DistributedDataParallel, each on data of its own.
One gets SIGKILL. Until its heartbeats have been missing for the heartbeat timeout nobody can know
that it will not come back, so that timeout is the floor. Then it is started again and heals, and
all end at the same step. At every step each group takes a digest of its parameters: whoever has
committed a step has the same digest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.lighthouse import lighthouse
from harness.training import Event, Mark, Step, train
from harness.workers import Worker, WorkerFailed

from torchft.retry import wait_until

JOIN_TIMEOUT_MS = 10_000
SETTLED_FOR_S = 1.0
"""The survivors go on by themselves for so long before the killed one comes back."""
AFTER_REJOINING = 10
"""Steps that it takes part in before the end is set …"""
UNTIL_THE_END = 30
"""… so many steps ahead."""


@dataclass(frozen=True)
class Options:
    """The job and its lighthouse."""

    heartbeat_timeouts_ms: tuple[int, ...] = option((5000, 1000), "of the lighthouse; one run each")
    groups: int = option(3, "replica groups; the last one is killed")
    min_replicas: int = option(2, "fewer groups than this do not commit")
    step_ms: float = option(
        20.0, "of each step spent asleep: half before it, as if loading, half in it"
    )
    warm_steps: int = option(20, "steps of all groups before the kill")
    timeout_s: float = option(90.0, "when a phase counts as stuck")


def measure(options: Options) -> Findings:
    """One run of the scenario for each heartbeat timeout."""
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    for timeout_ms in options.heartbeat_timeouts_ms:
        found = _found(_Scenario(options, timeout_ms).run(), options, timeout_ms)
        figures += found.figures
        details[f"heartbeat_timeout_{timeout_ms}_ms"] = found.details
    return Findings(figures, details)


# ---------------------------------------------------------------------- what happened


@dataclass(frozen=True)
class Record:
    """What happened, by process."""

    survivors: list[list[Step]]
    victim: list[Step]
    """Before the kill."""
    returned: list[Step]
    marks: dict[str, float]
    """When the one that came back had come how far."""
    killed_s: float
    restarted_s: float

    @property
    def all_steps(self) -> list[list[Step]]:
        """Of every process that there was."""
        return [*self.survivors, self.victim, self.returned]


class _Scenario:
    """Starts the groups, kills one, brings it back, ends all."""

    def __init__(self, options: Options, heartbeat_timeout_ms: int) -> None:
        self._options = options
        self._heartbeat_timeout_ms = heartbeat_timeout_ms
        self._living: list[Worker] = []
        self._events: dict[Worker, list[Event]] = {}

    def run(self) -> Record:
        """Run it to its end, and return what happened.

        Raises:
            WorkerFailed: a group that was not killed has ended, or a phase takes too long.
        """
        options = self._options
        with ExitStack() as stack:
            running = stack.enter_context(
                lighthouse(
                    min_replicas=options.min_replicas,
                    join_timeout_ms=JOIN_TIMEOUT_MS,
                    heartbeat_timeout_ms=self._heartbeat_timeout_ms,
                )
            )

            def start(group: int) -> Worker:
                worker = Worker(
                    train,
                    group=group,
                    address=running.address,
                    min_replicas=options.min_replicas,
                    step_ms=options.step_ms,
                )
                self._living.append(stack.enter_context(worker))
                self._events[worker] = []
                return worker

            *survivors, victim = [start(group) for group in range(options.groups)]
            everyone = [*survivors, victim]
            self._until(lambda: all(map(self._is_warm, everyone)), "warm-up")
            killed_s = time.monotonic()
            victim.kill()
            self._living.remove(victim)
            self._until(
                lambda: all(self._went_on(one, killed_s) for one in survivors), "next commit"
            )
            self._go_on_for(SETTLED_FOR_S)
            back = start(options.groups - 1)
            self._until(lambda: self._takes_part(back) >= AFTER_REJOINING, "return")
            self._end([*survivors, back])
        return Record(
            survivors=[self._steps(one) for one in survivors],
            victim=self._steps(victim),
            returned=self._steps(back),
            marks={event.name: event.t for event in self._events[back] if isinstance(event, Mark)},
            killed_s=killed_s,
            restarted_s=back.began_s,
        )

    def _is_warm(self, worker: Worker) -> bool:
        last = self._steps(worker)[-self._options.warm_steps :]
        whole = [one for one in last if one.committed and one.members == self._options.groups]
        return len(whole) >= self._options.warm_steps

    def _went_on(self, worker: Worker, since_s: float) -> bool:
        return any(one.committed and one.t > since_s for one in self._without(worker))

    def _without(self, worker: Worker) -> list[Step]:
        """Steps without the one that was killed."""
        return [one for one in self._steps(worker) if one.members < self._options.groups]

    def _takes_part(self, worker: Worker) -> int:
        return sum(one.committed and one.takes_part for one in self._steps(worker))

    def _end(self, workers: list[Worker]) -> None:
        last = max(self._steps(one)[-1].step for one in workers) + UNTIL_THE_END
        for worker in workers:
            worker.line.send(last)
        self._until(lambda: all(one.ended for one in workers), "end")

    def _steps(self, worker: Worker) -> list[Step]:
        return [event for event in self._events[worker] if isinstance(event, Step)]

    def _until(self, reached: Callable[[], bool], phase: str) -> None:
        if not wait_until(reached, self._options.timeout_s, sleep=self._go_on_for):
            said = "\n".join(worker.said() for worker in self._living)
            raise WorkerFailed(f"{phase}: not in {self._options.timeout_s:g} s\n{said}")

    def _go_on_for(self, seconds: float) -> None:
        time.sleep(seconds)
        for worker in self._living:
            self._events[worker] += worker.events(0)


# ---------------------------------------------------------------------- what it means


def _found(record: Record, options: Options, timeout_ms: int) -> Findings:
    next_commit = [_next_commit_s(steps, record, options.groups) for steps in record.survivors]
    discarded = [
        _discarded(steps, record.killed_s, record.restarted_s) for steps in record.survivors
    ]
    while_joining = [_discarded(steps, record.restarted_s) for steps in record.survivors]
    compared, differ = _digests(record.all_steps)
    step_s = _usual_step_s(record)
    back_s = _since_restart(record)
    case = f"heartbeat timeout {timeout_ms / 1e3:g} s"
    figures = [
        Figure("recovery.next_commit", f"kill to the survivors' next commit, {case}",
               max(next_commit), "s", Floor("heartbeat timeout", timeout_ms / 1e3)),
        Figure("recovery.discarded", f"steps that each survivor discarded, {case}",
               max(discarded), ""),
        Figure("recovery.return", f"restart to taking part, {case}",
               back_s["takes part"], "s", Floor("import torch, make AdamW", back_s["optimizer"])),
        Figure("recovery.digests_that_differ", f"digests that differ, of {compared}, {case}",
               differ, ""),
    ]  # fmt: skip
    return Findings(
        figures,
        {
            "next_commit_s": next_commit,
            "discarded": discarded,
            "discarded_while_joining": while_joining,
            "longest_step_while_joining_s": [
                _longest_step_s(steps, record.restarted_s) for steps in record.survivors
            ],
            "step_s": step_s,
            "since_restart_s": back_s,
        },
    )


def _next_commit_s(steps: list[Step], record: Record, groups: int) -> float:
    """Without the one that is gone: a step that all had all but committed does not count."""
    first = next(
        one for one in steps if one.committed and one.t > record.killed_s and one.members < groups
    )
    return first.t - record.killed_s


def _discarded(steps: list[Step], since_s: float, until_s: float = float("inf")) -> int:
    return sum(not one.committed and since_s < one.t < until_s for one in steps)


def _usual_step_s(record: Record) -> float:
    """Median, before the kill."""
    return statistics.median(
        later.t - one.t
        for steps in record.survivors
        for one, later in pairwise(steps)
        if later.t < record.killed_s
    )


def _longest_step_s(steps: list[Step], since_s: float) -> float:
    pairs = pairwise(steps)
    return max(later.t - one.t for one, later in pairs if later.t > since_s)


def _since_restart(record: Record) -> dict[str, float]:
    """Seconds from the start of its process to each mark of the one that came back."""
    first = next(one.t for one in record.returned if one.committed and one.takes_part)
    reached = {**record.marks, "takes part": first}
    return {name: t - record.restarted_s for name, t in reached.items()}


def _digests(all_steps: Iterable[list[Step]]) -> tuple[int, int]:
    """How many were compared with another group's at the same step, and how many differ."""
    known: dict[int, str] = {}
    compared = differ = 0
    for steps in all_steps:
        for one in steps:
            if one.committed:
                compared += one.step in known
                differ += known.setdefault(one.step, one.digest) != one.digest
    return compared, differ


QUICK = Options(heartbeat_timeouts_ms=(1000,), groups=2, min_replicas=1, step_ms=1, warm_steps=2)

if __name__ == "__main__":
    raise SystemExit(run("recovery_time", __doc__, Options(), QUICK, measure))
