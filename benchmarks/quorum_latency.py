"""A quorum against the number of replicas: what the lighthouse computes, and how long each waits.

All replicas ask at once, each on a thread of its own, and again as soon as they are answered. The
floor is as many heartbeats: the calls alone, without a quorum in them. The lighthouse's CPU time is
steady on a busy machine; the latencies contain the clients' own work on the same cores.

Then the same through managers, as a training step asks: a quorum and a vote.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from harness import machine
from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.floors import tcp_round_trip_us
from harness.lighthouse import lighthouse
from harness.spread import Spread, timed
from harness.threads import at_once

if TYPE_CHECKING:
    from torchft.coordination import LighthouseClient, ManagerClient

DEADLINE = timedelta(seconds=60)
CONNECTS_IN = timedelta(seconds=30)
# Nobody is late here on purpose: no replica may count as dead while this machine is slow.
PATIENT_MS = 60_000


@dataclass(frozen=True)
class Options:
    """How many, how often."""

    replicas: tuple[int, ...] = option((2, 8, 32, 128, 512), "sizes of the quorum")
    managers: tuple[int, ...] = option((2, 4, 8, 16), "the same, through managers")
    runs: int = option(3, "the least CPU time of several runs counts")
    rounds: int = option(200, "quorums in a run; at most 1600 / replicas, and at least 4")
    manager_rounds: int = option(100, "steps through managers")


def measure(options: Options) -> Findings:
    """Each size with a lighthouse of its own."""
    figures: list[Figure] = []
    details: dict[str, Any] = {"tcp_round_trip_us": asdict(tcp_round_trip_us())}
    for count in options.replicas:
        rounds = min(options.rounds, max(4, 1600 // count))
        found = _replicas(count, rounds, options.runs)
        figures += found.figures
        details[f"replicas_{count}"] = found.details
    for count in options.managers:
        found = _managers(count, options.manager_rounds)
        figures += found.figures
        details[f"managers_{count}"] = found.details
    return Findings(figures, details)


# ---------------------------------------------------------------------- the lighthouse


def _replicas(count: int, rounds: int, runs: int) -> Findings:
    from torchft.coordination import LighthouseClient

    with lighthouse(
        min_replicas=count, join_timeout_ms=PATIENT_MS, heartbeat_timeout_ms=PATIENT_MS
    ) as running:
        clients = [
            LighthouseClient(running.address, connect_timeout=CONNECTS_IN) for _ in range(count)
        ]
        quorum, heartbeat = _asking_for_quorums(clients), _sending_heartbeats(clients)
        _timings(quorum, count, rounds=2)
        quorums = [_cost(running.pid, quorum, count, rounds) for _ in range(runs)]
        _timings(heartbeat, count, rounds=1)
        floors = [_cost(running.pid, heartbeat, count, rounds) for _ in range(runs)]
        resident_mib = machine.resident_mib(running.pid)
    best, floor = min(quorums, key=_by_cpu), min(floors, key=_by_cpu)
    calls = f"{count} heartbeats"
    return Findings(
        [
            Figure(f"quorum.lighthouse_cpu.{count}", f"lighthouse CPU per quorum of {count}",
                   best.lighthouse_ms, "ms", Floor(calls, floor.lighthouse_ms)),
            Figure(f"quorum.wall.{count}", f"time per quorum of {count}",
                   best.wall_ms, "ms", Floor(calls, floor.wall_ms)),
        ],
        {
            "rounds": rounds,
            "quorum": [asdict(one) for one in quorums],
            "heartbeats": [asdict(one) for one in floors],
            "lighthouse_resident_mib": resident_mib,
        },
    )  # fmt: skip


Act = Callable[[int, int], object]
"""What replica `i` does in round `r`."""


def _asking_for_quorums(clients: list[LighthouseClient]) -> Act:
    def ask(index: int, step: int) -> None:
        quorum = clients[index].quorum(
            replica_id=_name(index),
            timeout=DEADLINE,
            address=f"http://127.0.0.1:{20000 + index}",
            store_address=f"127.0.0.1:{30000 + index}",
            step=step,
            world_size=1,
        )
        if len(quorum.participants) != len(clients):
            raise RuntimeError(f"{len(quorum.participants)} of {len(clients)} are in the quorum")

    return ask


def _sending_heartbeats(clients: list[LighthouseClient]) -> Act:
    return lambda index, _: clients[index].heartbeat(_name(index))


def _name(index: int) -> str:
    return f"replica_{index:04d}"


@dataclass(frozen=True)
class Cost:
    """Of one round: everybody acts once."""

    lighthouse_ms: float
    """CPU time."""
    clients_ms: float
    """CPU time of all clients together."""
    wall_ms: float
    latency_ms: Spread
    """What each caller waited."""


def _by_cpu(cost: Cost) -> float:
    return cost.lighthouse_ms


def _cost(pid: int, act: Act, count: int, rounds: int) -> Cost:
    lighthouse_s, clients_s = machine.cpu_seconds(pid), time.process_time()
    began = time.perf_counter()
    latencies = _timings(act, count, rounds)
    per_round_ms = 1e3 / rounds
    return Cost(
        wall_ms=(time.perf_counter() - began) * per_round_ms,
        lighthouse_ms=(machine.cpu_seconds(pid) - lighthouse_s) * per_round_ms,
        clients_ms=(time.process_time() - clients_s) * per_round_ms,
        latency_ms=Spread.of(latencies, scale=1e3),
    )


def _timings(act: Act, count: int, rounds: int) -> list[float]:
    """Seconds of every call, of all that act at once."""
    found: list[float] = []

    def acts(index: int) -> None:
        for turn in range(rounds):
            found.append(timed(partial(act, index, turn)))

    at_once([partial(acts, index) for index in range(count)])
    return found


# ---------------------------------------------------------------------- through managers


def _managers(count: int, rounds: int) -> Findings:
    from torchft.coordination import ManagerClient, ManagerServer

    with ExitStack() as stack:
        running = stack.enter_context(
            lighthouse(
                min_replicas=count, join_timeout_ms=PATIENT_MS, heartbeat_timeout_ms=PATIENT_MS
            )
        )
        clients = []
        for index in range(count):
            server = ManagerServer(
                replica_id=_name(index),
                lighthouse_addr=running.address,
                hostname="127.0.0.1",
                bind="127.0.0.1:0",
                store_addr="127.0.0.1:1",
                world_size=1,
                heartbeat_interval=timedelta(milliseconds=100),
                connect_timeout=CONNECTS_IN,
                quorum_retries=0,
            )
            stack.callback(server.shutdown)
            clients.append(ManagerClient(server.address(), connect_timeout=CONNECTS_IN))
        quorums: list[float] = []
        votes: list[float] = []
        step = _stepping(clients, quorums, votes)
        _timings(step, count, rounds=2)
        quorums.clear()
        votes.clear()
        cost = _cost(running.pid, step, count, rounds)
    quorum_ms, vote_ms = Spread.of(quorums, scale=1e3), Spread.of(votes, scale=1e3)
    name = f"quorum and vote by {count} managers, median"
    return Findings(
        [Figure(f"quorum.managers.{count}", name, quorum_ms.p50 + vote_ms.p50, "ms")],
        {"quorum_ms": asdict(quorum_ms), "vote_ms": asdict(vote_ms), "step": asdict(cost)},
    )


def _stepping(clients: list[ManagerClient], quorums: list[float], votes: list[float]) -> Act:
    def step(index: int, _: int) -> None:
        quorums.append(timed(lambda: _quorum(clients[index])))
        votes.append(timed(lambda: clients[index].should_commit(0, 1, True, timeout=DEADLINE)))

    return step


def _quorum(client: ManagerClient) -> None:
    client._quorum(
        group_rank=0,
        step=1,
        checkpoint_metadata="",
        shrink_only=False,
        init_sync=False,
        commit_failures=0,
        timeout=DEADLINE,
    )


QUICK = Options(replicas=(2,), managers=(2,), runs=1, rounds=2, manager_rounds=2)

if __name__ == "__main__":
    os.environ.setdefault("TOKIO_WORKER_THREADS", "1")
    raise SystemExit(run("quorum_latency", __doc__, Options(), QUICK, measure))
