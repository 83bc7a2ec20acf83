"""What it costs in learning not to wait for the slowest: held-out losses under each mode of rounds.

Four nodes and a parameter server, the rounds and outer steps being the server's own, in simulated
time. They learn a toy, ten classes of points that a random network has told apart, and the bytes
of Python's standard library. All modes take as many steps and see as many samples; a synchronous
node takes a quarter of them, and where two nodes are four times as fast as the two others, a fast
one takes more in the other modes. Speeds do not change what synchronous rounds learn. A loss is
that of the common weights on what nobody trained on; it and the gaps are means over seeds, ± their
standard deviation. A gap is taken seed by seed.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness.cli import Findings, option, run
from harness.figures import Figure, Floor, gaps
from harness.simulated_server import Node, Plan, Simulated
from torch import Tensor, nn
from torch.nn import functional

from torchft.experiments import datasets
from torchft.experiments.models import Gpt
from torchft.parameter_server.core.options import OuterOptions
from torchft.parameter_server.core.rules import Mode, Rules

NODES = 4
FAST_S = 0.25
SPEEDS = {"equal": [FAST_S] * NODES, "1:4": [FAST_S, FAST_S, 4 * FAST_S, 4 * FAST_S]}
"""Seconds of a step of each node."""
CASES = [
    (Mode.SYNCHRONOUS, "equal"),
    (Mode.DECOUPLED, "equal"),
    (Mode.DECOUPLED, "1:4"),
    (Mode.ASYNCHRONOUS, "equal"),
    (Mode.ASYNCHRONOUS, "1:4"),
]


@dataclass(frozen=True)
class Options:
    """How much is learned."""

    steps: int = option(800, "inner steps of all four nodes together, of the bytes")
    sync_every: int = option(5, "H")
    batch: int = option(8, "rows of 64 bytes in a step")
    seeds: int = option(3, "runs of each case")
    held_out: int = option(1024, "rows that a loss is taken on")
    toy_steps: int = option(1600, "inner steps of all four nodes together, of the toy")


@dataclass(frozen=True)
class Task:
    """What is learned: samples follow from a generator."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    sample: Callable[[torch.Generator], Any]
    held_out: Any
    steps: int
    inner_lr: float
    outer: OuterOptions


@dataclass(frozen=True)
class Trained:
    """One mode at one kind of speeds."""

    losses: list[float]
    """By seed."""
    simulated_s: float


Found = dict[tuple[str, Mode, str], Trained]


def measure(options: Options) -> Findings:
    """All in this process, on one thread."""
    tasks = [_toy(options), _bytes(options)]
    found = {
        (task.name, mode, speeds): _trained(task, mode, speeds, options)
        for task in tasks
        for mode, speeds in CASES
    }
    details = {f"{t}.{mode}.{speeds}": one for (t, mode, speeds), one in found.items()}
    return Findings(list(_figures(found)), details)


def _trained(task: Task, mode: Mode, speeds: str, options: Options) -> Trained:
    losses, simulated_s = [], 0.0
    for seed in range(1, options.seeds + 1):
        nodes = [_node(task, seed, place, SPEEDS[speeds][place]) for place in range(NODES)]
        rules = Rules(NODES, mode)
        world = Simulated(Plan(rules, task.outer, options.sync_every, task.steps, seed), nodes)
        world.run()
        losses.append(_held_out_loss(task, nodes[0].model))
        simulated_s += world.now / options.seeds
        said = f"{task.name}, {mode}, {speeds}, seed {seed}: {losses[-1]:.4f}, {world.now:.0f} s"
        print(said, file=sys.stderr, flush=True)
    return Trained(losses, simulated_s)


def _node(task: Task, seed: int, place: int, step_s: float) -> Node:
    """Equal weights at first, and samples of its own."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.inner_lr)
    generator = torch.Generator().manual_seed(1000 * seed + place)

    def train(step: int, done: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = task.inner_lr * _rate(done)
        optimizer.zero_grad()
        task.loss(model, task.sample(generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Node(f"n{place}", model, train, step_s)


def _rate(done: float) -> float:
    """It rises for an eighth of the run, then falls along a cosine."""
    rising = 0.125
    if done < rising:
        return (done + 0.02) / (rising + 0.02)
    return 0.5 * (1 + math.cos(math.pi * (done - rising) / (1 - rising)))


@torch.no_grad()
def _held_out_loss(task: Task, model: nn.Module) -> float:
    return float(task.loss(model.eval(), task.held_out))


# ---------------------------------------------------------------------- tasks


def _toy(options: Options) -> Task:
    """Points in 32 dimensions, their class told by a network of random weights. Of inner rates
    1e-3, 3e-3 and 1e-2 and outer ones .4 and .7 the best for synchronous rounds, on seed 0."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10, bias=False))
    nn.init.normal_(teacher[0].weight, std=0.3)
    nn.init.normal_(teacher[2].weight, std=0.5)

    @torch.no_grad()
    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        points = torch.randn(count, 32, generator=generator)
        return points, teacher(points).argmax(1)

    return Task(
        name="toy",
        model=lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)),
        loss=lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        sample=lambda generator: draw(32, generator),
        held_out=draw(4096, torch.Generator().manual_seed(7)),
        steps=options.toy_steps,
        inner_lr=1e-3,
        outer=OuterOptions(lr=0.4, momentum=0.9),
    )


def _bytes(options: Options) -> Task:
    """Of outer rates .4, .7 and 1 and momenta 0, .5, .8 and .9, on seed 0, the one with a momentum
    that submissions which come one by one bear: synchronous rounds end 2 % above their best."""
    train, held_out = datasets.text()
    rows = held_out[:: max(1, len(held_out) // options.held_out)][: options.held_out]

    def sample(generator: torch.Generator) -> Tensor:
        return train[torch.randint(len(train), (options.batch,), generator=generator)]

    return Task(
        name="bytes",
        model=Gpt,
        loss=lambda model, batch: model(batch),
        sample=sample,
        held_out=rows,
        steps=options.steps,
        inner_lr=2e-3,
        outer=OuterOptions(lr=0.4, momentum=0.5),
    )


# ---------------------------------------------------------------------- figures


def _figures(found: Found) -> Iterator[Figure]:
    for (task, mode, speeds), one in found.items():
        plain = found[task, Mode.SYNCHRONOUS, "equal"]
        key, case = f"{task}.{mode}.{speeds}", f"{task}, {mode}, {speeds} speeds"
        floor = None if one is plain else Floor("synchronous", statistics.fmean(plain.losses))
        title = f"held-out loss, {case}"
        yield Figure.mean(f"server_learning.{key}", title, one.losses, "nats", floor)
        if one is not plain:
            above = gaps(one.losses, plain.losses)
            title = f"gap to synchronous, {case}"
            yield Figure.mean(f"server_learning.gap.{key}", title, above, "%")


QUICK = Options(steps=16, sync_every=2, batch=1, seeds=1, held_out=8, toy_steps=32)

if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run("server_learning", __doc__, Options(), QUICK, measure))
