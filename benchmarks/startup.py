"""What it costs to be there: imports, a lighthouse that starts, idles, and serves many replicas.

Imports are compared with `import torch` in CPU seconds, the least of several fresh processes. The
lighthouse is the command, from its process's start until it listens; its memory is read when it
idles and again after quorums of many replicas, which then send heartbeats as fast as they would.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from harness import machine
from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.floors import spawn_process_s
from harness.lighthouse import lighthouse
from harness.spread import Spread
from harness.threads import at_once

if TYPE_CHECKING:
    from torchft.coordination import LighthouseClient

BARE = "pass"
TORCH = "import torch"
OURS = "from torchft import Manager, DistributedDataParallel"
COORDINATION = "import torchft.coordination"

HEAVY = ("torch._dynamo", "sympy")
"""Modules that take seconds and that training does not need."""
COUNT_HEAVY = f"import sys; print(sum(name in sys.modules for name in {HEAVY}))"

SENDERS = 8
QUORUM_DEADLINE = timedelta(seconds=60)


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    repeats: int = option(3, "how often each thing is started; the least CPU time counts")
    replicas: int = option(512, "how many ask the lighthouse for a quorum")
    heartbeats_per_s: int = option(10, "of each replica; 10 is what a manager sends")
    heartbeats_for_s: float = option(5.0, "seconds of heartbeats")


def measure(options: Options) -> Findings:
    """Imports first, while nothing else runs."""
    figures, details = _imports(options.repeats)
    more_figures, more_details = _lighthouse(options)
    return Findings(figures + more_figures, details | more_details)


# ---------------------------------------------------------------------- imports


@dataclass(frozen=True)
class Import:
    """One fresh Python that ran one statement."""

    cpu_s: float
    wall_s: float
    heavy: int
    """How many of HEAVY it has loaded."""


def _imports(repeats: int) -> tuple[list[Figure], dict[str, Any]]:
    runs = {
        statement: [_import(statement) for _ in range(repeats)]
        for statement in (BARE, TORCH, OURS, COORDINATION)
    }
    added = runs[OURS][0].heavy - runs[TORCH][0].heavy
    figures = [
        _import_figure("import", runs, OURS, TORCH),
        _import_figure("import_coordination", runs, COORDINATION, BARE),
        Figure("startup.heavy_modules", f"how many of {', '.join(HEAVY)} that adds", added, ""),
    ]
    wall = {name: asdict(Spread.of([one.wall_s for one in found])) for name, found in runs.items()}
    return figures, {"imports_wall_s": wall}


def _import_figure(
    key: str, runs: Mapping[str, list[Import]], statement: str, floor: str
) -> Figure:
    ours, theirs = (min(one.cpu_s for one in runs[name]) for name in (statement, floor))
    name = "python" if floor == BARE else floor
    return Figure(f"startup.{key}", f"`{statement}`", ours, "CPU s", Floor(name, theirs))


def _import(statement: str) -> Import:
    command = [sys.executable, "-c", f"{statement}; {COUNT_HEAVY}"]
    cpu_s, began = _childrens_cpu_s(), time.perf_counter()
    heavy = int(subprocess.check_output(command, text=True))
    return Import(_childrens_cpu_s() - cpu_s, time.perf_counter() - began, heavy)


def _childrens_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ---------------------------------------------------------------------- lighthouse


def _lighthouse(options: Options) -> tuple[list[Figure], dict[str, Any]]:
    floor = spawn_process_s()
    cpu, wall = [], []
    for _ in range(options.repeats):
        with lighthouse(min_replicas=1) as started:
            cpu.append(machine.cpu_seconds(started.pid))
            wall.append(started.listening_after_s)
    figures = [
        Figure("startup.lighthouse_cpu", "lighthouse, start to listening", min(cpu), "CPU s"),
        Figure(
            "startup.lighthouse_wall",
            "the same, wall time",
            min(wall),
            "s",
            Floor("a process that does nothing", floor.p50),
        ),
    ]
    more, details = _with_replicas(options)
    return figures + more, {"lighthouse_starts_s": asdict(Spread.of(wall)), **details}


def _with_replicas(options: Options) -> tuple[list[Figure], dict[str, Any]]:
    count = options.replicas
    with lighthouse(
        min_replicas=count, join_timeout_ms=60_000, heartbeat_timeout_ms=60_000
    ) as running:
        idle_mib, idle_cpu = _idle(running.pid)
        threads = machine.threads(running.pid)
        clients = _clients(running.address, count)
        for _ in range(2):
            at_once([partial(_join, one, index) for index, one in enumerate(clients)])
        used_mib = machine.resident_mib(running.pid)
        each_us, per_s = _heartbeats(running.pid, clients, options)
        peak_mib = machine.peak_mib(running.pid)
    target_per_s = count * options.heartbeats_per_s
    figures = [
        Figure("startup.lighthouse_memory", "lighthouse memory, idle", idle_mib, "MiB"),
        Figure("startup.replica_memory", f"for each of {count} replicas",
               (used_mib - idle_mib) * 1024 / count, "KiB"),
        Figure("startup.heartbeats", f"lighthouse CPU for {target_per_s} heartbeats/s",
               each_us * target_per_s / 1e4, "%"),
    ]  # fmt: skip
    details = {
        "lighthouse_idle_cpu_percent": idle_cpu,
        "lighthouse_idle_threads": threads,
        "lighthouse_peak_mib": peak_mib,
        "heartbeat_cpu_us": each_us,
        "heartbeats_per_s": per_s,
    }
    return figures, details


def _idle(pid: int, seconds: float = 2.0) -> tuple[float, float]:
    """MiB and percent of a core that it takes to wait."""
    time.sleep(0.5)
    before = machine.cpu_seconds(pid)
    time.sleep(seconds)
    return machine.resident_mib(pid), (machine.cpu_seconds(pid) - before) / seconds * 100


def _clients(address: str, count: int) -> list[LighthouseClient]:
    from torchft.coordination import LighthouseClient

    return [LighthouseClient(address, connect_timeout=timedelta(seconds=30)) for _ in range(count)]


def _name(index: int) -> str:
    """As long as a real replica id."""
    return f"replica_{index:04d}:{'0' * 36}"


def _join(client: LighthouseClient, index: int) -> None:
    client.quorum(
        replica_id=_name(index),
        timeout=QUORUM_DEADLINE,
        address=f"http://host{index:04d}:20000",
        store_address=f"host{index:04d}:29500",
        step=1,
        world_size=8,
    )


def _heartbeats(
    pid: int, clients: Sequence[LighthouseClient], options: Options
) -> tuple[float, float]:
    """Lighthouse CPU microseconds of each heartbeat, and how many came a second: up to what that
    many replicas send, fewer when this machine's clients cannot."""
    senders = min(SENDERS, len(clients))
    pace_per_s = len(clients) * options.heartbeats_per_s / senders
    sent = [0] * senders
    stop = threading.Event()

    def send(first: int) -> None:
        began, turn = time.perf_counter(), first
        while not stop.wait(max(0.0, began + sent[first] / pace_per_s - time.perf_counter())):
            clients[turn].heartbeat(_name(turn))
            sent[first] += 1
            turn = (turn + senders) % len(clients)

    def end() -> None:
        time.sleep(options.heartbeats_for_s)
        stop.set()

    cpu_s, began = machine.cpu_seconds(pid), time.perf_counter()
    at_once([*(partial(send, first) for first in range(senders)), end])
    took_s = time.perf_counter() - began
    return (machine.cpu_seconds(pid) - cpu_s) / sum(sent) * 1e6, sum(sent) / took_s


QUICK = Options(repeats=1, replicas=4, heartbeats_for_s=0.2)

if __name__ == "__main__":
    os.environ.setdefault("TOKIO_WORKER_THREADS", "1")
    raise SystemExit(run("startup", __doc__, Options(), QUICK, measure))
