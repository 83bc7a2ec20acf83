"""How fast the simulator is, on one thread, and whether what it simulates learns.

Speeds are node-steps per CPU second: one forward, backward and step of one node. The floor is the
plain loop, one model and its optimizer on the same batches, in turns with the simulator. The last
figures are held-out losses, means over several seeds. What a fresh process takes is measured by
simulator_starts.py.
"""

from __future__ import annotations

import resource
import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.simulating import (
    STRATEGIES,
    Samples,
    beside,
    learned,
    loader_batches,
    plain_loop,
    simulate,
)
from harness.small_work import Work, work

NODES = 4
PLAIN = "the plain loop"


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    steps: int = option(300, "steps of each node of the mlp")
    gpt_steps: int = option(40, "steps of each node of the gpt")
    block: int = option(10, "steps that simulator and plain loop take in turn")
    images: int = option(60_000, "pictures to train the mlp on")
    seeds: int = option(3, "runs whose held-out losses are averaged")
    many_nodes: tuple[int, ...] = option((2, 16, 64), "how many nodes a node-step is timed with")


def measure(options: Options) -> Findings:
    """All in this process, on one thread."""
    parts = (_speeds, _loaders, _many_nodes, _learning)
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    for part in parts:
        more = part(options)
        figures += more.figures
        details |= more.details
    return Findings(figures, details)


# ---------------------------------------------------------------------- speed


def _speeds(options: Options) -> Findings:
    mlp, gpt = work("mlp", images=options.images), work("gpt")
    cases = [(mlp, name, options.steps, options.block) for name in STRATEGIES]
    cases += [(gpt, "diloco", options.gpt_steps, max(1, options.block // 5))]
    figures, details = [], {}
    for task, name, steps, block in cases:
        speeds, result = beside(
            task, STRATEGIES[name](task), nodes=NODES, steps=steps, block=min(block, steps)
        )
        key = f"{task.name}.{name}"
        figures.append(
            Figure(
                f"simulator.{key}",
                f"{task.name}, {name.replace('_', '-')}, {NODES} nodes",
                speeds.ours,
                "node-steps/CPU s",
                Floor(PLAIN, speeds.plain),
            )
        )
        details[key] = {
            "node_steps": steps * NODES,
            "bytes_of_a_node": result.bytes_sent[0],
            "ratio_of_blocks": [
                plain / ours for ours, plain in zip(speeds.ours_s, speeds.plain_s, strict=True)
            ],
        }
    return Findings(figures, details)


def _loaders(options: Options) -> Findings:
    """Data sets that hand out one sample at a time, here and by processes of their own."""
    mlp = work("mlp", images=options.images)
    samples = Samples(mlp.data()[0])
    speeds, _ = beside(
        mlp,
        STRATEGIES["diloco"](mlp),
        nodes=NODES,
        steps=options.steps,
        block=min(options.block, options.steps),
        batches=loader_batches(mlp, samples),
        train_dataset=samples,
    )
    ours, plain = _with_workers(mlp, samples, options.steps)
    unit = "node-steps/CPU s"
    return Findings(
        [
            Figure("simulator.samples", "mlp, diloco, data set of samples", speeds.ours, unit,
                   Floor("the plain loop, DataLoader", speeds.plain)),
            Figure("simulator.workers", "the same, one loader process a node", ours, unit,
                   Floor("the plain loop, DataLoader with a process", plain)),
        ],
        {},
    )  # fmt: skip


def _with_workers(mlp: Work, samples: Samples, steps: int) -> tuple[float, float]:
    """Node-steps per CPU second of this process and its children: simulated, plain."""

    def simulated(many: int) -> None:
        simulate(mlp, STRATEGIES["diloco"](mlp), num_nodes=NODES, max_steps=many,
                 train_dataset=samples, dataloader_kwargs={"num_workers": 1})  # fmt: skip

    def plain(many: int) -> None:
        batches = loader_batches(mlp, samples, workers=1)
        step = plain_loop(mlp, batches)
        for _ in range(many * NODES):
            step()
        batches.close()

    speeds = []
    for act in (simulated, plain):
        act(1)
        before = _cpu_s()
        act(steps)
        speeds.append(steps * NODES / (_cpu_s() - before))
    return speeds[0], speeds[1]


def _cpu_s() -> float:
    """Of this process, and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _many_nodes(options: Options) -> Findings:
    mlp = work("mlp", images=options.images)
    figures, costs = [], []
    for nodes in options.many_nodes:
        steps = max(2, options.steps * NODES // nodes)
        block = max(1, options.block * NODES // nodes)
        speeds, _ = beside(mlp, STRATEGIES["diloco"](mlp), nodes=nodes, steps=steps, block=block)
        ours, plain = 1e3 / speeds.ours, 1e3 / speeds.plain
        costs.append(ours / plain)
        figures.append(
            Figure(f"simulator.node_step.{nodes}", f"mlp, diloco, a node-step of {nodes} nodes",
                   ours, "CPU ms", Floor(PLAIN, plain))
        )  # fmt: skip
    first, last = options.many_nodes[0], options.many_nodes[-1]
    name = f"a node-step of {last} nodes, in steps of the plain loop"
    floor = Floor(f"of {first} nodes", costs[0])
    figures.append(Figure("simulator.flat", name, costs[-1], "", floor))
    return Findings(figures, {})


# ---------------------------------------------------------------------- learning


def _learning(options: Options) -> Findings:
    """300 steps, H = 20: what is learned is the algorithm's, not the machine's."""
    mlp = work("mlp", images=options.images)
    figures, details = [], {}
    for name in ("diloco", "fedavg"):
        for nodes in (2, NODES):
            key = f"learning.{name}.{nodes}"
            losses = learned(
                key,
                mlp,
                partial(STRATEGIES[name], mlp),
                seeds=options.seeds,
                num_nodes=nodes,
                max_steps=options.steps,
            ).losses
            title = f"held-out loss, mlp, {name}, {nodes} nodes, mean of {len(losses)} seeds"
            figures.append(Figure(f"simulator.{key}", title, statistics.fmean(losses), "nats"))
            details[key] = losses
    return Findings(figures, details)


QUICK = Options(
    steps=2,
    gpt_steps=1,
    block=1,
    images=1024,
    seeds=1,
    many_nodes=(2, 4),
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run("simulator", __doc__, Options(), QUICK, measure))
