"""What a synchronisation with the parameter server costs: seconds, CPU seconds, bytes, memory.

A server and two workers, each a process of its own, over loopback. In turns with them three other
processes move as many bytes over plain sockets, to a hub and back when the hub has all: the floor.
One synchronisation is encoding, sending, checking, the outer step, news, and adopting them. Those
up to the first checkpoint are not counted: until then each upload is a new file, for which the
system has to find pages, and afterwards an old one is written over. Bytes are those that a relay
between a worker and the server has seen, headers and all. Memory is a process's peak, from before
there was a model at the server, and from when a worker had its model and gradients; the start and a
checkpoint are in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from harness.bulk import hub, leaf
from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.machine import cpu_seconds
from harness.serving import Memory, Pace, Wire, serve, work
from harness.spread import Spread
from harness.workers import Worker

CODECS = ("fp32", "int8", "int4")
WORKERS = 2
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """How large, how often."""

    side: int = option(2092, "each layer is a matrix of side x side float32")
    layers: int = option(12, "matrices")
    times: int = option(7, "synchronisations that are timed")
    before: int = option(12, "synchronisations before them")
    timeout_s: float = option(300.0, "when a run counts as stuck")

    @property
    def numel(self) -> int:
        """Parameters."""
        return self.layers * self.side**2


@dataclass(frozen=True)
class Turns:
    """Rounds of one kind."""

    wall_ms: Spread
    cpu_s: float
    """Of all its processes, a round."""


@dataclass(frozen=True)
class Found:
    """Under one codec."""

    sync: Turns
    raw: Turns
    bytes_per_parameter: float
    server: Memory
    worker: Memory


def measure(options: Options) -> Findings:
    """One codec after the other, in the same processes."""
    with ExitStack() as stack:
        server = stack.enter_context(Worker(serve))
        workers = [stack.enter_context(Worker(work)) for _ in range(WORKERS)]
        found = {codec: _case(server, workers, codec, options) for codec in CODECS}
    figures = [figure for codec, one in found.items() for figure in _figures(codec, one, options)]
    return Findings(figures, {codec: asdict(one) for codec, one in found.items()})


def _figures(codec: str, one: Found, options: Options) -> Iterator[Figure]:
    floor, cpu_floor = one.raw.wall_ms.p50, one.raw.cpu_s
    size = options.numel / MIB

    def figure(key: str, name: str, value: float, unit: str, floor: Floor | None = None) -> Figure:
        return Figure(f"server.{key}.{codec}", f"{name}, {codec}", value, unit, floor)

    name = "raw sockets, as many bytes"
    yield figure(
        "sync", "a synchronisation, median", one.sync.wall_ms.p50, "ms", Floor(name, floor)
    )
    yield figure("cpu", "the same, all processes", one.sync.cpu_s, "CPU s", Floor(name, cpu_floor))
    yield figure("bytes", "on the wire, up and down", one.bytes_per_parameter, "B/parameter")
    yield figure("memory", "the server, peak", one.server.above / size, "B/parameter")
    name = "a worker, peak above model and gradients"
    yield figure("worker_memory", name, one.worker.above / size, "B/parameter")


def _case(server: Worker, workers: Sequence[Worker], codec: str, options: Options) -> Found:
    nbytes = round(options.numel * _BYTES[codec])
    with _sockets(nbytes, options) as raw, _Fleet(server, workers, codec, options) as fleet:
        turns = _in_turns([raw, fleet.rounds], options)
        memory = fleet.end()
    counted = _counted(server, workers[0], codec, options)
    return Found(turns[1], turns[0], counted, *memory)


_BYTES = {"fp32": 4.0, "int8": 1 + 4 / 256, "int4": 0.5 + 4 / 64}
"""Of a parameter, each way."""

Round = Callable[[], float]
Rounds = tuple[Sequence[int], Round]
"""Processes that take part, and one round: seconds from the first's begin to the last's end."""


def _in_turns(kinds: Sequence[Rounds], options: Options) -> list[Turns]:
    for _, once in kinds:
        for _ in range(options.before):
            once()
    wall: list[list[float]] = [[] for _ in kinds]
    cpu = [0.0 for _ in kinds]
    for _ in range(options.times):
        for at, (pids, once) in enumerate(kinds):
            before = sum(map(cpu_seconds, pids))
            wall[at].append(once())
            cpu[at] += sum(map(cpu_seconds, pids)) - before
    return [
        Turns(Spread.of(walls, scale=1e3), spent / options.times)
        for walls, spent in zip(wall, cpu, strict=True)
    ]


@contextmanager
def _sockets(nbytes: int, options: Options) -> Iterator[Rounds]:
    with ExitStack() as stack:
        middle = stack.enter_context(Worker(hub, leaves=WORKERS, nbytes=nbytes))
        (port,) = middle.events(options.timeout_s)
        leaves = [
            stack.enter_context(Worker(leaf, port=port, nbytes=nbytes)) for _ in range(WORKERS)
        ]
        _each_says(leaves, options)
        yield [one.pid for one in (middle, *leaves)], lambda: _round(leaves, options)


class _Fleet:
    """A server and workers at it, in processes that go on afterwards."""

    def __init__(
        self,
        server: Worker,
        workers: Sequence[Worker],
        codec: str,
        options: Options,
        through: Callable[[int], int] = lambda port: port,
    ) -> None:
        self._server, self._workers, self._options = server, workers, options
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        server.line.send({"folder": self._folder.name, "workers": len(workers)})
        port = through(server.event(options.timeout_s))
        for at, worker in enumerate(workers):
            case = {"name": f"w{at}", "address": f"127.0.0.1:{port}", "codec": codec}
            worker.line.send({**case, "side": options.side, "count": options.layers})
        _each_says(workers, options)

    def __enter__(self) -> _Fleet:
        return self

    def __exit__(self, *raised: object) -> None:
        self._folder.cleanup()

    @property
    def rounds(self) -> Rounds:
        """A synchronisation of all."""
        pids = [one.pid for one in (self._server, *self._workers)]
        return pids, lambda: _round(self._workers, self._options)

    def end(self) -> tuple[Memory, Memory]:
        """Of the server, and of the first worker."""
        for worker in self._workers:
            worker.line.send(None)
        worker_memory: Memory = _each_says(self._workers, self._options)[0]
        self._server.line.send(None)
        server_memory: Memory = self._server.event(self._options.timeout_s)
        return server_memory, worker_memory


def _counted(server: Worker, worker: Worker, codec: str, options: Options) -> float:
    """Bytes a parameter of one synchronisation, by one worker."""
    with ExitStack() as stack:
        wires: list[Wire] = []

        def through(port: int) -> int:
            wires.append(stack.enter_context(Wire(port)))
            return wires[0].port

        fleet = stack.enter_context(_Fleet(server, [worker], codec, options, through))
        _, once = fleet.rounds
        once()
        before = wires[0].nbytes
        once()
        counted = wires[0].nbytes - before
        fleet.end()
        return counted / options.numel


def _round(workers: Sequence[Worker], options: Options) -> float:
    for worker in workers:
        worker.line.send(True)
    paces: list[Pace] = _each_says(workers, options)
    return max(pace.ended_s for pace in paces) - min(pace.began_s for pace in paces)


def _each_says(workers: Sequence[Worker], options: Options) -> list[Any]:
    return [worker.event(options.timeout_s) for worker in workers]


QUICK = Options(side=64, layers=2, times=1, before=1)

if __name__ == "__main__":
    raise SystemExit(run("server", __doc__, Options(), QUICK, measure))
