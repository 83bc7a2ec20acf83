"""What a dead worker costs the living, and whether many workers on one server get stuck.

Eight workers train; one of them, a process of its own, is killed with SIGKILL between two of its
synchronisations. The seven others share a process. Each tells how long its longest synchronisation
after the kill took: until the dead one is taken for silent, which is the grace window after its
last sign of life. Then many workers, some processes with as many threads each, synchronise a small
model as often as they can: rounds a second, and how many are stuck at the end.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.serving import serve
from harness.workers import Worker, results

GRACE_S = 5.0
EVERY = 5
"""H."""
PROCESSES = 2


@dataclass(frozen=True)
class Options:
    """How many, how long."""

    workers: int = option(8, "workers of which one is killed")
    kills: int = option(3, "how often that is done")
    step_ms: float = option(20.0, "a training step of theirs")
    crowd: int = option(64, "workers that synchronise as often as they can")
    rounds: int = option(50, "synchronisations of each of those")
    timeout_s: float = option(300.0, "when a run counts as stuck")


def measure(options: Options) -> Findings:
    """The kills, then the crowd."""
    waits = [_kill(options) for _ in range(options.kills)]
    stuck, seconds = _crowd(options)
    grace = Floor("the grace window", GRACE_S)
    name = f"kill of one of {options.workers}: the longest that a survivor waited"
    crowd = f"of {options.crowd} workers"
    return Findings(
        [
            Figure("server_faults.kill", name, max(waits), "s", grace),
            Figure("server_faults.stuck", f"stuck, {crowd}", stuck, ""),
            Figure("server_faults.rounds", f"rounds {crowd}", options.rounds / seconds, "1/s"),
        ],
        {"waits_s": waits, "crowd_s": seconds},
    )


def _kill(options: Options) -> float:
    """Seconds of the longest synchronisation of a survivor."""
    with ExitStack() as stack:
        port = _server(stack, options.workers)
        common = {"port": port, "step_s": options.step_ms / 1e3}
        victim = stack.enter_context(Worker(_trainers, names=["victim"], **common))
        names = [f"w{at}" for at in range(options.workers - 1)]
        survivors = stack.enter_context(Worker(_trainers, names=names, **common))
        for worker in (victim, survivors):
            worker.event(options.timeout_s)  # its workers have synchronised
        victim.kill()
        survivors.line.send("killed")
        (wait,) = results([survivors], timeout_s=options.timeout_s)
        return float(wait)


def _crowd(options: Options) -> tuple[int, float]:
    """How many are stuck, and the seconds from when all are there to the last one's end."""
    with ExitStack() as stack:
        port = _server(stack, options.crowd)
        each = options.crowd // PROCESSES
        fleets = [
            stack.enter_context(
                Worker(
                    _crowd_part,
                    names=[f"p{part}w{at}" for at in range(each)],
                    port=port,
                    rounds=options.rounds,
                    timeout_s=options.timeout_s,
                )
            )
            for part in range(PROCESSES)
        ]
        found = results(fleets, timeout_s=3 * options.timeout_s)
        began = min(part_began for _, part_began, _ in found)
        return sum(stuck for stuck, _, _ in found), max(ended for _, _, ended in found) - began


def _server(stack: ExitStack, workers: int) -> int:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-"))
    server = stack.enter_context(Worker(serve))
    server.line.send({"folder": folder, "workers": workers, "grace_s": GRACE_S})
    return int(server.event(120.0))


# ---------------------------------------------------------------------- in the processes


def _trainers(line: Connection, *, names: list[str], port: int, step_s: float) -> float:
    """Says when all have synchronised twice; when it is told of the kill, all go on for some
    rounds. The longest synchronisation since, in seconds."""
    began = threading.Barrier(len(names) + 1)
    killed = threading.Event()
    longest = dict.fromkeys(names, 0.0)

    def train(name: str) -> None:
        with _trainee(name, port, EVERY) as synchronise:
            synchronise(2, step_s)
            began.wait()
            while not killed.is_set():
                longest[name] = synchronise(1, step_s)  # the last of these sees the kill
            for _ in range(3):
                longest[name] = max(longest[name], synchronise(1, step_s))

    threads = _started(names, train)
    began.wait()
    line.send("synchronised")
    line.recv()
    killed.set()
    for thread in threads:
        thread.join()
    return max(longest.values())


def _crowd_part(
    line: Connection, *, names: list[str], port: int, rounds: int, timeout_s: float
) -> tuple[int, float, float]:
    """How many are stuck, when the first round of the first was over, and when the last ended."""
    done: dict[str, tuple[float, float]] = {}

    def train(name: str) -> None:
        with _trainee(name, port, 1) as synchronise:
            synchronise(1, 0.0)
            began = time.monotonic()
            synchronise(rounds, 0.0)
            done[name] = began, time.monotonic()

    threads = _started(names, train)
    end = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    stuck = sum(thread.is_alive() for thread in threads)
    if not done:
        return stuck, 0.0, timeout_s
    return stuck, min(at for at, _ in done.values()), max(at for _, at in done.values())


def _started(names: list[str], train: Callable[[str], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=train, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    return threads


@contextmanager
def _trainee(name: str, port: int, sync_every: int) -> Iterator[Callable[[int, float], float]]:
    """A worker with a small model: takes so many cycles with steps of so many seconds, and returns
    the longest synchronisation, in seconds."""
    import torch

    from torchft.parameter_server import DiLoCoWorker

    torch.set_num_threads(1)
    model = torch.nn.Linear(32, 32)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def synchronise(times: int, step_s: float) -> float:
        longest = 0.0
        for _ in range(times):
            for _ in range(sync_every):
                time.sleep(step_s)
                optimizer.step()
            longest = max(longest, worker.last_sync_time_s)
        return longest

    with DiLoCoWorker(
        model, optimizer, f"127.0.0.1:{port}", worker_id=name, sync_every=sync_every
    ) as worker:
        yield synchronise


QUICK = Options(workers=3, kills=1, crowd=4, rounds=2)

if __name__ == "__main__":
    raise SystemExit(run("server_faults", __doc__, Options(), QUICK, measure))
