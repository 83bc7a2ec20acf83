"""A step that computes nothing: `start_quorum`, wait for it, `should_commit`.

That is what fault tolerance adds to each training step, besides averaging. The floor is one
heartbeat: a call to the same lighthouse that asks for nothing. Groups of one rank, one process
each, all on this machine; with several the step is as slow as the slowest.

Every run gets a fresh lighthouse and fresh managers; of several runs the best median counts.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.floors import heartbeat_ms, tcp_round_trip_us
from harness.group import manager_of
from harness.lighthouse import lighthouse
from harness.spread import Spread
from harness.workers import Worker, results

if TYPE_CHECKING:
    from torchft import Manager

WARM_UP = 20
MODES = {"async": True, "sync": False}
"""Whether the quorum forms in the background: `use_async_quorum`."""


@dataclass(frozen=True)
class Options:
    """How many, how often."""

    groups: tuple[int, ...] = option((1, 2), "replica groups that step together")
    steps: int = option(400, "steps in a run")
    runs: int = option(3, "runs of each mode")
    timeout_s: float = option(120.0, "when a run counts as stuck")


def measure(options: Options) -> Findings:
    """One figure for each number of groups and each mode, and the heartbeat itself."""
    figures: list[Figure] = []
    trip_us = tcp_round_trip_us()
    details: dict[str, Any] = {"tcp_round_trip_us": asdict(trip_us)}
    for groups in options.groups:
        phases = _all_phases(groups, options)
        beat_ms = min(phase.heartbeat_ms.p50 for phase in phases)
        figures += [_figure(groups, mode, phases, beat_ms) for mode in MODES]
        details[f"groups_{groups}"] = [asdict(phase) for phase in phases]
        if groups == min(options.groups):
            trip = Floor("TCP round trip", trip_us.p50 / 1e3)
            figures.append(Figure("commit.heartbeat", "a heartbeat, median", beat_ms, "ms", trip))
    return Findings(figures, details)


@dataclass(frozen=True)
class Phase:
    """One run as its first group saw it."""

    mode: str
    quorum_ms: Spread
    vote_ms: Spread
    step_ms: Spread
    cpu_ms: float
    """Of this process, a step."""
    committed: int
    heartbeat_ms: Spread
    """Taken right after the steps, with nothing else going on."""


def _figure(groups: int, mode: str, phases: list[Phase], beat_ms: float) -> Figure:
    best = min(phase.step_ms.p50 for phase in phases if phase.mode == mode)
    name = f"a step of {groups} group{'s' * (groups > 1)}, {mode} quorum, median"
    return Figure("commit.step", name, best, "ms", Floor("heartbeat", beat_ms))


def _all_phases(groups: int, options: Options) -> list[Phase]:
    modes = list(MODES) * options.runs
    with ExitStack() as stack:
        addresses = [stack.enter_context(lighthouse(min_replicas=groups)).address for _ in modes]
        workers = [
            stack.enter_context(
                Worker(
                    _worker,
                    group=group,
                    groups=groups,
                    steps=options.steps,
                    plan=list(zip(addresses, modes, strict=True)),
                )
            )
            for group in range(groups)
        ]
        first: list[Phase] = results(workers, timeout_s=options.timeout_s)[0]
    return first


# ---------------------------------------------------------------------- in the workers


def _worker(
    line: Connection, *, group: int, groups: int, steps: int, plan: list[tuple[str, str]]
) -> list[Phase]:
    import torch

    torch.set_num_threads(1)
    phases = []
    for address, mode in plan:
        with manager_of(
            group,
            lighthouse=address,
            min_replicas=groups,
            use_async_quorum=MODES[mode],
            init_sync=False,
        ) as manager:
            for _ in range(WARM_UP):
                _step(manager)
            phases.append(_phase(manager, address, mode, steps))
    return phases


def _phase(manager: Manager, address: str, mode: str, steps: int) -> Phase:
    committed, cpu_s = manager.current_step(), time.process_time()
    times = [_step(manager) for _ in range(steps)]
    return Phase(
        mode=mode,
        quorum_ms=Spread.of([quorum_s for quorum_s, _ in times], scale=1e3),
        vote_ms=Spread.of([vote_s for _, vote_s in times], scale=1e3),
        step_ms=Spread.of([sum(both) for both in times], scale=1e3),
        cpu_ms=(time.process_time() - cpu_s) / steps * 1e3,
        committed=manager.current_step() - committed,
        heartbeat_ms=heartbeat_ms(address),
    )


def _step(manager: Manager) -> tuple[float, float]:
    """Seconds of the quorum and of the vote."""
    began = time.perf_counter()
    manager.start_quorum()
    manager.wait_quorum()
    formed = time.perf_counter()
    manager.should_commit()
    return formed - began, time.perf_counter() - formed


QUICK = Options(groups=(1,), steps=2, runs=1)

if __name__ == "__main__":
    raise SystemExit(run("commit_latency", __doc__, Options(), QUICK, measure))
