"""How much of the time groups train behind slow links: bandwidth by H, with and without overlap.

Two groups live on hosts of their own, each behind a modem (`torchft.network_namespaces`) that their
averages share with heartbeats, quorums and votes. A training step is a sleep of known length, so
that the figures say the same on every machine. The floor is a formula:

    transfer  = bytes of a round / what the link carries besides headers
    exposed   = transfer - delay, not below 0: what training cannot hide
    predicted = compute / (compute + exposed)

Beside it: what passed the link for each payload byte (headers, acknowledgements and control), for
how much of a transfer the loop stood still, and how often somebody was taken for dead. Root only.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.group import manager_of
from harness.workers import Worker

from torchft.network_namespaces import Host, Link, Network

GROUPS = 2
FRAGMENTS = 4
PACKET, CARRIED, EMPTY = 1514, 1448, 66
"""Bytes of a full frame, what TCP carries in it, a frame that only acknowledges (every second)."""
BLOCKED = ("quorum", "configure", "communicate", "vote")
"""Buckets of the ledger in which the loop waits for others."""


@dataclass(frozen=True)
class Options:
    """The links, and what travels."""

    mbit_s: tuple[int, ...] = option((1000, 100, 10), "of each link, both directions")
    sync_every: tuple[int, ...] = option((20, 100), "H: inner steps between synchronisations")
    slots: tuple[int, ...] = option(
        (1,), f"streaming delays, in distances between rounds: H/{FRAGMENTS} steps each"
    )
    kilobytes: int = option(8000, "float32 parameters of the model")
    step_ms: float = option(20.0, "of a training step")
    cycles: int = option(2, "synchronisations of the whole model that are timed, after one")
    queue_ms: float = option(250.0, "what waits in a modem at most")
    heartbeat_timeout_ms: int = option(5000, "of the lighthouse")
    timeout_s: float = option(240.0, "when a case counts as stuck")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    mbit_s: int
    sync_every: int
    slots: int
    """0: DiLoCo, whole and at once."""
    codec: str | None
    kilobytes: int
    step_ms: float
    cycles: int

    @property
    def fragments(self) -> int:
        """How many."""
        return FRAGMENTS if self.slots else 1

    @property
    def delay(self) -> int:
        """In inner steps."""
        return self.slots * (self.sync_every // FRAGMENTS)

    @property
    def name(self) -> str:
        """For people."""
        kind = f"streaming, delay {self.delay}" if self.slots else "DiLoCo"
        return f"{self.mbit_s} Mbit/s, H = {self.sync_every}, {kind}, {self.codec or 'fp32'}"

    @property
    def key(self) -> str:
        """For goals."""
        return f"{self.mbit_s}.{self.sync_every}.{self.slots}.{self.codec or 'fp32'}"


@dataclass(frozen=True)
class Found:
    """One group's view of the cycles that are timed; bytes are those of all."""

    compute_s: float
    wall_s: float
    blocked_s: float
    payload_bytes: int
    rounds: int
    """That are timed."""
    all_rounds: int
    discarded: int
    quorums: int


def measure(options: Options) -> Findings:
    """All cases by the same two processes."""
    figures: list[Figure] = []
    details = []
    false_deaths = 0
    traffic: defaultdict[int, Counter[str]] = defaultdict(Counter)
    with Network() as network, ExitStack() as stack:
        link = Link(options.mbit_s[0], options.queue_ms)
        hosts = [network.host(link) for _ in range(GROUPS)]
        workers = [
            stack.enter_context(Worker(_worker, group=group, host=host))
            for group, host in enumerate(hosts)
        ]
        for case in _cases(options):
            found, passed = _run(network, hosts, workers, case, options)
            false_deaths += sum(one.quorums - 1 + one.discarded for one in found)
            figures += _figures(case, found)
            payload = sum(one.payload_bytes for one in found)
            traffic[case.mbit_s].update(payload=payload, passed=passed["link_bytes"])
            details.append({"case": asdict(case), "groups": list(map(asdict, found)), **passed})
    figures += [_bytes(mbit_s, count) for mbit_s, count in traffic.items()]
    figures.append(Figure("links.false_deaths", "groups taken for dead", false_deaths, ""))
    return Findings(figures, {"cases": details})


def _cases(options: Options) -> Iterator[Case]:
    common = (options.kilobytes, options.step_ms, options.cycles)
    for mbit_s, sync_every, slots, codec in product(
        options.mbit_s, options.sync_every, (0, *options.slots), (None, "int8")
    ):
        yield Case(mbit_s, sync_every, slots, codec, *common)


def _run(
    network: Network, hosts: list[Host], workers: list[Worker], case: Case, options: Options
) -> tuple[list[Found], dict[str, int]]:
    """What each group saw, and what has passed their links."""
    for host in hosts:
        network.shape(host, Link(case.mbit_s, options.queue_ms))
    with _lighthouse_on(
        network.centre,
        min_replicas=GROUPS,
        heartbeat_timeout_ms=options.heartbeat_timeout_ms,
    ) as address:
        for worker in workers:
            worker.line.send((case, address))
        found = [one for worker in workers for one in worker.events(options.timeout_s)]
    if len(found) != GROUPS:
        raise TimeoutError(f"{case.name}: not done in {options.timeout_s:g} s")
    sent = [network.sent(host) for host in hosts]
    return found, {
        "link_bytes": sum(one.bytes for one in sent),
        "dropped": sum(one.dropped for one in sent),
    }


# ---------------------------------------------------------------------- what it means


def transfer_s(payload_bytes: float, mbit_s: float) -> float:
    """How long a link is busy with so many bytes and their headers."""
    return 8 * payload_bytes * PACKET / CARRIED / (mbit_s * 1e6)


def predicted(compute_s: float, transfer: float, hidden_s: float) -> float:
    """Share of the time in which a group trains; all between two rounds."""
    return compute_s / (compute_s + max(0.0, transfer - hidden_s))


def _figures(case: Case, found: list[Found]) -> list[Figure]:
    """Of the group that trained least."""
    one = min(found, key=lambda one: one.compute_s / one.wall_s)
    transfer = transfer_s(one.payload_bytes / one.all_rounds, case.mbit_s)
    step_s = one.compute_s / (case.sync_every * case.cycles)
    between_s = step_s * case.sync_every / case.fragments
    share = predicted(between_s, transfer, case.delay * step_s)
    return [
        Figure(
            f"links.trains.{case.key}",
            f"{case.name}: trains",
            100 * one.compute_s / one.wall_s,
            "%",
            Floor("formula", 100 * share),
        ),
        Figure(
            f"links.blocked.{case.key}",
            "the same, blocked for so much of a transfer",
            100 * one.blocked_s / (one.rounds * transfer),
            "%",
        ),
    ]


def _bytes(mbit_s: int, count: Counter[str]) -> Figure:
    """Of all cases at one bandwidth: what passed the links, beside what was counted."""
    with_headers = count["payload"] * (PACKET / CARRIED + EMPTY / (2 * CARRIED))
    return Figure(
        f"links.bytes.{mbit_s}",
        f"{mbit_s} Mbit/s: passed the links",
        count["passed"] / 1e6,
        "MB",
        Floor(f"{count['payload'] / 1e6:.1f} counted, and TCP's headers", with_headers / 1e6),
    )


# ---------------------------------------------------------------------- in the workers


@contextmanager
def _lighthouse_on(host: Host, *, min_replicas: int, heartbeat_timeout_ms: int) -> Iterator[str]:
    """A lighthouse on `host` until the block ends; its address."""
    arguments = {"min_replicas": min_replicas, "heartbeat_timeout_ms": heartbeat_timeout_ms}
    with Worker(_serve_lighthouse, host=host, **arguments) as worker:
        (address,) = worker.events(60.0)
        yield address


def _serve_lighthouse(line: Connection, *, host: Host, **options: int) -> None:
    host.enter()
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind=f"{host.address}:0", join_timeout_ms=60_000, **options)
    line.send(server.address())
    line.recv()


def _worker(line: Connection, *, group: int, host: Host) -> None:
    host.enter()
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch cannot look up the name of a host that has none
    while True:
        case, address = line.recv()
        with tempfile.TemporaryDirectory() as folder:
            records = Path(folder) / "steps.jsonl"
            os.environ["TORCHFT_STEP_RECORDS"] = str(records)
            line.send(_case(group, host, case, address, records))


def _case(group: int, host: Host, case: Case, address: str, records: Path) -> Found:
    import torch

    from torchft.local_sgd import DiLoCo
    from torchft.records import read_step_records

    torch.manual_seed(0)
    parts = _parts(case)
    parameters = [p for part in parts for p in part.parameters()]
    for p in parameters:
        p.grad = torch.full_like(p, 1e-3 * (group + 1))
    inner = torch.optim.SGD(parameters, lr=1e-3)
    outer = [
        torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in parts
    ]
    with (
        manager_of(
            group,
            lighthouse=address,
            min_replicas=GROUPS,
            timeout_s=120,
            address=host.address,
            init_sync=False,
            use_async_quorum=case.delay > 0,
        ) as manager,
        DiLoCo(
            manager,
            list(parts),
            inner,
            outer,
            case.sync_every,
            should_quantize=case.codec or False,
            fragment_sync_delay=case.delay,
        ),
    ):
        _train(manager, inner, case.sync_every, case.step_ms)
        before, began_step = manager.ledger.snapshot(), manager.current_step()
        began = time.perf_counter()
        _train(manager, inner, case.sync_every * case.cycles, case.step_ms)
        wall_s = time.perf_counter() - began
        after, ended_step = manager.ledger.snapshot(), manager.current_step()
    spent = {bucket: after[bucket] - before.get(bucket, 0.0) for bucket in after}
    steps = list(read_step_records(records))
    return Found(
        compute_s=spent["compute"],
        wall_s=wall_s,
        blocked_s=sum(spent.get(bucket, 0.0) for bucket in BLOCKED),
        payload_bytes=sum(step.bytes_sent for step in steps),
        rounds=ended_step - began_step,
        all_rounds=len(steps),
        discarded=sum(not step.committed for step in steps),
        quorums=len({step.quorum_id for step in steps}),
    )


def _parts(case: Case) -> Any:
    """The model: as many matrices as fragments."""
    from torch import nn

    width = 250
    rows = case.kilobytes * 250 // case.fragments // width
    return [nn.Linear(width, rows, bias=False) for _ in range(case.fragments)]


def _train(manager: Any, inner: Any, steps: int, step_ms: float) -> None:
    for _ in range(steps):
        with manager.ledger.spending("compute"):
            time.sleep(step_ms / 1e3)
        inner.step()


QUICK = Options(mbit_s=(100,), sync_every=(4,), kilobytes=100, step_ms=1.0, cycles=1)

if __name__ == "__main__":
    raise SystemExit(run("links", __doc__, Options(), QUICK, measure))
