"""What a simulation takes that starts afresh: time until it runs, and memory.

Time is from `python` to the result, of one step and of 300 steps of 4 nodes, and of a second run in
the same process. The floor is what any training has to load. Memory is the peak of a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from harness import machine
from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.small_work import work
from harness.workers import Worker, results

FOLDER = Path(__file__).parent
NODES = 4
SYNC_EVERY = 2  # steps, of which a run for its memory has few
TIMEOUT_S = 600


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    steps: int = option(300, "steps of each node of the mlp")
    images: int = option(60_000, "pictures to train the mlp on")
    memory_nodes: int = option(64, "how many nodes share the memory that is read")
    repeats: int = option(3, "how often each fresh process is started; the least counts")


def measure(options: Options) -> Findings:
    """One process after the other."""
    return Findings([*_starts(options), *_memory(options)], {})


# ---------------------------------------------------------------------- starts

TRAIN = """
import time, torch
from harness.small_work import work
from torchft.experiments import Trainer
from torchft.strategies import DiLoCoStrategy, OptimSpec

torch.set_num_threads(1)
mlp = work("mlp", images={images})
trainer = Trainer(mlp.model(), mlp.data()[0])

def fit(steps):
    strategy = DiLoCoStrategy(OptimSpec(torch.optim.AdamW, lr=mlp.lr), H=20)
    trainer.fit(
        num_epochs=2, max_steps=steps, strategy=strategy, num_nodes={nodes}, batch_size=mlp.batch,
        minibatch_size=mlp.batch, disable_logging=True,
    )
    print(time.process_time(), time.monotonic())
"""
"""As a user would write it, on data that is on disk already. Says after each fit how much CPU time
the process has had, and the time on the clock that all processes share."""

OPTIMIZER = """
import time, torch
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
print(time.process_time(), time.monotonic())
"""
"""What any training has to load."""


@dataclass(frozen=True)
class Took:
    """Since the process was started."""

    cpu_s: float
    wall_s: float

    def since(self, earlier: Took) -> Took:
        """What came after `earlier`."""
        return Took(self.cpu_s - earlier.cpu_s, self.wall_s - earlier.wall_s)


def _starts(options: Options) -> list[Figure]:
    work("mlp", images=options.images).data()  # from now on they are on disk
    code = TRAIN.format(images=options.images, nodes=NODES)
    many = f"fit({options.steps})"
    twice = [_fresh(f"{code}\n{many}\n{many}") for _ in range(options.repeats)]
    cold = _least([first for first, _ in twice])
    warm = _least([second.since(first) for first, second in twice])
    start = _least([_fresh(f"{code}\nfit(1)")[0] for _ in range(options.repeats)])
    floor = _least([_fresh(OPTIMIZER)[0] for _ in range(options.repeats)])
    run_of = f"mlp, diloco, {NODES} nodes, {options.steps} steps"
    return [
            Figure("simulator.start", "`python` to the result of one step", start.cpu_s, "CPU s",
                   Floor("import torch, make AdamW", floor.cpu_s)),
            Figure("simulator.cold", f"`python` to the result: {run_of}", cold.cpu_s, "CPU s"),
            Figure("simulator.cold", "the same, wall time", cold.wall_s, "s"),
            Figure("simulator.warm", f"a second fit(): {run_of}", warm.cpu_s, "CPU s"),
            Figure("simulator.warm", "the same, wall time", warm.wall_s, "s"),
    ]  # fmt: skip


def _least(took: Sequence[Took]) -> Took:
    return Took(min(one.cpu_s for one in took), min(one.wall_s for one in took))


def _fresh(code: str) -> list[Took]:
    """What a new Python says, line by line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (FOLDER, FOLDER.parent)))}
    began = time.monotonic()
    said = subprocess.check_output(
        [sys.executable, "-c", code], text=True, env=environment, timeout=TIMEOUT_S
    )
    lines = [[float(number) for number in line.split()] for line in said.splitlines()]
    return [Took(cpu_s, at - began) for cpu_s, at in lines]


# ---------------------------------------------------------------------- memory


def _memory(options: Options) -> list[Figure]:
    nodes = options.memory_nodes
    figures = []
    for name in ("mlp", "gpt"):
        worker = Worker(_peak_mib, name=name, nodes=nodes, images=options.images)
        (peak,) = results([worker], timeout_s=TIMEOUT_S)
        title = f"peak memory, {name}, diloco, {nodes} nodes"
        figures.append(Figure(f"simulator.memory.{name}", title, peak, "MiB"))
    return figures


def _peak_mib(line: Connection, name: str, nodes: int, images: int) -> float:
    """After two synchronisations."""
    import torch
    from harness.simulating import adamw, simulate

    from torchft.strategies import DiLoCoStrategy

    torch.set_num_threads(1)
    task = work(name, images=images)
    strategy = DiLoCoStrategy(adamw(task), H=SYNC_EVERY)
    simulate(task, strategy, num_nodes=nodes, max_steps=2 * SYNC_EVERY)
    return machine.peak_mib(os.getpid())


QUICK = Options(steps=2, images=1024, memory_nodes=2, repeats=1)

if __name__ == "__main__":
    raise SystemExit(run("simulator_starts", __doc__, Options(), QUICK, measure))
