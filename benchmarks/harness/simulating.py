"""A simulated run beside the plain loop that does the same work: a block of steps of one, then as
many of the other, in the same process, so that whatever else the machine does hits both."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.small_work import Work, held_out_loss
from torchft import strategies
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import run_stacked
from torchft.simulator.result import Result
from torchft.strategies import OptimSpec, Strategy

__all__ = [
    "STRATEGIES",
    "Samples",
    "Speeds",
    "Trained",
    "adamw",
    "beside",
    "learned",
    "loader_batches",
    "plain_loop",
    "simulate",
]

H, P, SEED = 20, 0.005, 1
_DISCARDED_BLOCKS = 1  # the first pays for what is made once

Batches = Iterator[Any]


@dataclass
class Speeds:
    """CPU seconds of blocks of equal work."""

    node_steps: int
    """In each block."""
    ours_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)

    @property
    def ours(self) -> float:
        """Node-steps per CPU second."""
        return self._per_s(self.ours_s)

    @property
    def plain(self) -> float:
        """The same of the plain loop."""
        return self._per_s(self.plain_s)

    def _per_s(self, blocks: Sequence[float]) -> float:
        counted = blocks[_DISCARDED_BLOCKS:] or blocks
        return self.node_steps * len(counted) / sum(counted)


def beside(
    work: Work,
    strategy: Strategy,
    *,
    nodes: int,
    steps: int,
    block: int,
    batches: Batches | None = None,
    **more: Any,
) -> tuple[Speeds, Result]:
    """Simulate, and after every `block` steps let the plain loop take as many for each node.

    `batches` are the plain loop's; without them they are cut from tensors. `more` goes to the
    experiment.
    """
    plain = plain_loop(work, batches or tensor_batches(work))
    speeds = Speeds(block * nodes)
    began = 0.0

    def on_step(run: Any) -> None:
        nonlocal began
        if run.step and run.step % block == 0:
            speeds.ours_s.append(time.process_time() - began)
            speeds.plain_s.append(_cpu_s(plain, block * nodes))
        if run.step % block == 0:
            began = time.process_time()

    more |= {"num_nodes": nodes, "max_steps": steps, "on_step": on_step}
    return speeds, simulate(work, strategy, **more)


def simulate(work: Work, strategy: Strategy, *, seed: int = SEED, **more: Any) -> Result:
    """One run, all at once and on the CPU; `more` are `on_step` and fields of the experiment."""
    torch.manual_seed(seed)
    on_step = more.pop("on_step", None)
    given = {"model": work.model(), "train_dataset": work.data()[0], "batch_size": work.batch}
    experiment = Experiment(**{**given, **more}, strategy=strategy, seed=seed, device="cpu")
    return run_stacked(experiment, on_step=on_step)


@dataclass(frozen=True)
class Trained:
    """What one strategy learned."""

    losses: list[float]
    """Held-out ones of the mean of the nodes' models, in nats, by seed."""
    bytes_of_a_node: int


def learned(
    name: str,
    work: Work,
    make: Callable[[], Strategy],
    *,
    seeds: int,
    rows: int = 2_048,
    **more: Any,
) -> Trained:
    """Simulate with each of the seeds from 1 on; each loss is written to stderr as it comes."""
    losses: list[float] = []
    for seed in range(1, seeds + 1):
        result = simulate(work, make(), seed=seed, **more)
        assert result.model is not None
        losses.append(held_out_loss(result.model, work, rows=rows))
        print(f"{name}, seed {seed}: {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return Trained(losses, result.bytes_sent[0])


def plain_loop(work: Work, batches: Batches) -> Callable[[], object]:
    """One model, one optimizer, nothing else; each call is a step."""
    torch.manual_seed(SEED)
    model = work.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.lr)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(next(batches))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def tensor_batches(work: Work) -> Batches:
    """Cut out of the data, in a new order each epoch, without end."""
    data, _ = work.data()
    luck = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(data), generator=luck)
        for rows in order.split(work.batch):
            if len(rows) == work.batch:
                yield data[rows]


@dataclass(frozen=True)
class Samples(torch.utils.data.Dataset[Any]):
    """Hands out one row at a time, as most data sets do."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]


def loader_batches(work: Work, dataset: Any, workers: int = 0) -> Batches:
    """The same by torch's DataLoader."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=work.batch, shuffle=True, drop_last=True, num_workers=workers
    )
    while True:
        yield from loader


def _cpu_s(step: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        step()
    return time.process_time() - began


# ---------------------------------------------------------------------- strategies


def adamw(work: Work) -> OptimSpec:
    """The inner optimizer of all that have one."""
    return OptimSpec(torch.optim.AdamW, lr=work.lr)


STRATEGIES: dict[str, Callable[[Work], Strategy]] = {
    "diloco": lambda work: strategies.DiLoCoStrategy(adamw(work), H=H),
    "fedavg": lambda work: strategies.FedAvgStrategy(adamw(work), H=H),
    "all_reduce": lambda work: strategies.SimpleReduceStrategy(adamw(work)),
    "sparta": lambda work: strategies.SPARTAStrategy(adamw(work), p_sparta=P),
    "demo": lambda _: strategies.DeMoStrategy(),
}
"""By name; each call makes one for one run."""
