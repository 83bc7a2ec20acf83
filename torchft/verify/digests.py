"""Whether simulation and real processes compute the same bits, on this machine.

    python -m torchft.verify.digests --steps 200 --nodes 4

Each strategy runs twice: its nodes as rows of one process, and as real processes over gloo with the
manager. After every step in which a round committed, each node's digest (its weights, and what all
share) must be equal. The model has odd sizes, a tied weight, dropout and a parameter that nothing
uses; it reads the bytes of Python's standard library. Then some run again while a process is killed
in a round and heals later; the simulation repeats that from the processes' step records. Prints a
table; the exit code is 0 only if all digests are equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchft.errors import SettingsError
from torchft.experiments.processes import run_processes
from torchft.simulator.events import Dies, Event, Joins
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import run_stacked
from torchft.simulator.node import TrainNode
from torchft.simulator.replay import events_of
from torchft.simulator.result import Result
from torchft.strategies import (
    DeMoStrategy,
    DiLoCoStrategy,
    LocalSGDStrategy,
    OptimSpec,
    SimpleReduceStrategy,
    SPARTAStrategy,
    Strategy,
    StreamingDiLoCoStrategy,
)
from torchft.toy.text import read_text
from torchft.verify.served import Served, ServedPair, compare_served

__all__ = ["SERVED", "STRATEGIES", "OddModel", "Pair", "compare", "experiment_of", "main", "serve"]

Digests = list[str | None]
"""Of one step, by node; None: it was not there."""

CONTEXT, SYMBOLS = 7, 101
ADAMW = OptimSpec(torch.optim.AdamW, lr=3e-3)

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "all-reduce": lambda: SimpleReduceStrategy(ADAMW, max_norm=1.0),
    "LocalSGD": lambda: LocalSGDStrategy(ADAMW, H=10),
    "DiLoCo": lambda: DiLoCoStrategy(
        ADAMW,
        H=10,
        lr_scheduler="lambda_cosine",
        lr_scheduler_kwargs={"warmup_steps": 20, "cosine_anneal": True},
    ),
    "Streaming DiLoCo": lambda: StreamingDiLoCoStrategy(ADAMW, H=12, fragments=3),
    "Streaming delayed": lambda: StreamingDiLoCoStrategy(
        ADAMW, H=12, fragments=3, delay=3, mix=0.5
    ),
    "Streaming in flight": lambda: StreamingDiLoCoStrategy(
        ADAMW, H=12, fragments=3, delay=10, mix=0.5
    ),
    "Streaming, strided": lambda: StreamingDiLoCoStrategy(
        ADAMW, H=12, fragments=3, pattern="strided"
    ),
    "DiLoCo bf16": lambda: DiLoCoStrategy(ADAMW, H=10, codec="bf16"),
    "DiLoCo int8": lambda: DiLoCoStrategy(ADAMW, H=10, codec="int8"),
    "DiLoCo int4": lambda: DiLoCoStrategy(ADAMW, H=10, codec="int4"),
    "Streaming bf16": lambda: StreamingDiLoCoStrategy(ADAMW, H=12, fragments=3, codec="bf16"),
    "Streaming int8": lambda: StreamingDiLoCoStrategy(ADAMW, H=12, fragments=3, codec="int8"),
    "Streaming int4": lambda: StreamingDiLoCoStrategy(ADAMW, H=12, fragments=3, codec="int4"),
    "int4, fed back": lambda: DiLoCoStrategy(ADAMW, H=5, codec="int4", error_feedback=True),
    "SPARTA": lambda: SPARTAStrategy(ADAMW, p_sparta=0.05),
    "DeMo": lambda: DeMoStrategy(compression_topk=4, compression_chunk=16),
}
WITH_A_KILL = ("all-reduce", "DiLoCo", "DiLoCo int8", "Streaming in flight", "int4, fed back")
"""These run again, and lose a node for a while."""
SERVED = {
    "DiLoCo": Served(10, 1, "fp32"),
    "DiLoCo bf16": Served(10, 1, "bf16"),
    "DiLoCo int8": Served(10, 1, "int8"),
    "DiLoCo int4": Served(10, 1, "int4"),
    "Streaming DiLoCo": Served(12, 3, "fp32"),
    "Streaming bf16": Served(12, 3, "bf16"),
    "Streaming int8": Served(12, 3, "int8"),
    "Streaming int4": Served(12, 3, "int4"),
}
"""These run through a parameter server too: every H of how many fragments, and the codec."""


class OddModel(nn.Module):
    """Predicts a byte from those before it: `loss = model(windows)`. No size divides another."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, 11)
        self.hidden = nn.Linear(11 * CONTEXT, 23)
        self.norm = nn.LayerNorm(23)
        self.dropout = nn.Dropout(0.1)
        self.back = nn.Linear(23, 11)
        self.logits = nn.Linear(11, SYMBOLS)
        self.logits.weight = self.symbols.weight  # tied
        self.unused = nn.Linear(3, 5)

    def forward(self, windows: Tensor) -> Tensor:
        """uint8 [batch, context + 1] → the mean loss of the last byte, in nats."""
        bytes_ = windows.long() % SYMBOLS
        seen = self.symbols(bytes_[:, :CONTEXT]).flatten(1)
        hidden = self.dropout(functional.gelu(self.norm(self.hidden(seen))))
        return functional.cross_entropy(self.logits(self.back(hidden)), bytes_[:, CONTEXT])


def windows(samples: int = 5000) -> Tensor:
    """uint8 [samples, context + 1], evenly spread over the standard library's sources.

    Raises:
        CorpusError: this Python has none.
    """
    text = torch.frombuffer(bytearray(read_text()), dtype=torch.uint8)
    return text.unfold(0, CONTEXT + 1, len(text) // samples)[:samples].contiguous()


def experiment_of(
    name: str,
    *,
    steps: int,
    nodes: int = 4,
    events: Sequence[Event] = (),
    deterministic: bool = True,
) -> Experiment:
    """A strategy of the table, on the odd model."""
    return Experiment(
        model=OddModel,
        train_dataset=windows(),
        strategy=STRATEGIES[name](),
        num_nodes=nodes,
        max_steps=steps,
        batch_size=9,
        device="cpu",
        deterministic=deterministic,
        digests=True,
        events=events,
    )


@dataclass(frozen=True)
class Pair:
    """One experiment that was run in two ways, with its digests."""

    real: Result
    simulated: Result
    seconds: float

    @property
    def synchronisations(self) -> int:
        """Steps in which a round committed, in the processes."""
        return len(self.real.digests)

    @property
    def first_difference(self) -> int | None:
        """The first step whose digests are not all equal. None: there is none."""
        real, simulated = dict(self.real.digests), dict(self.simulated.digests)
        steps = sorted(real.keys() | simulated.keys())
        return next((s for s in steps if not self._equal(real.get(s), simulated.get(s))), None)

    def _equal(self, real: Digests | None, simulated: Digests | None) -> bool:
        if real is None or simulated is None:
            return False
        # Whoever was killed after a round may not have lived to tell its digest of it.
        killed = set(range(self.real.num_nodes)) - set(self.real.alive)
        killed |= {heal.node for heal in self.real.heals}
        pairs = enumerate(zip(real, simulated, strict=True))
        return all(a == b or (a is None and node in killed) for node, (a, b) in pairs)

    @property
    def equal(self) -> bool:
        """Every digest of every node, and there are some."""
        return self.synchronisations > 0 and self.first_difference is None

    @property
    def last_digest(self) -> str:
        """Of the first node that is there, in the processes."""
        if not self.real.digests:
            return "-"
        return next(of for of in self.real.digests[-1][1] if of is not None)


def compare(
    name: str,
    *,
    steps: int,
    nodes: int = 4,
    events: Sequence[Event] = (),
    deterministic: bool = True,
    node_cls: type[TrainNode] = TrainNode,
    method: str | None = None,
) -> Pair:
    """Run processes; then simulate what happened to them, with nodes that are not killed."""
    started = perf_counter()
    experiment = experiment_of(
        name, steps=steps, nodes=nodes, events=events, deterministic=deterministic
    )
    real = run_processes(replace(experiment, node_cls=node_cls), method=method)
    simulated = run_stacked(replace(experiment, events=events_of(real.records)))
    return Pair(real, simulated, perf_counter() - started)


def serve(name: str, *, steps: int, nodes: int = 4, method: str | None = None) -> ServedPair:
    """Run a strategy of the table through a parameter server; then simulate that."""
    experiment = experiment_of(name, steps=steps, nodes=nodes)
    return compare_served(experiment, SERVED[name], method=method)


COLUMNS = "{:<28} {:>8} {:>6} {:>11} {:>17} {:>6} {:>8}"


def _line(name: str, pair: Pair, served: ServedPair | None, seconds: float) -> str:
    return COLUMNS.format(
        name,
        pair.synchronisations,
        "yes" if pair.equal else "NO",
        "-" if pair.first_difference is None else f"step {pair.first_difference}",
        pair.last_digest[:16],
        "-" if served is None else "yes" if served.equal else "NO",
        f"{seconds:.1f}",
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m torchft.verify.digests",
        description="Compare digests of simulated and of real nodes at every synchronisation.",
    )
    parser.add_argument("--steps", type=int, default=200, help="inner steps (%(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="nodes, and processes (%(default)s)")
    parser.add_argument(
        "--strategy", action="append", choices=list(STRATEGIES), help="only this one; repeatable"
    )
    parser.add_argument(
        "--no-kill", dest="kill", action="store_false", help="lose no node, in no run"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when all are equal, 1 when not, 2 when it cannot run."""
    options = _options(argv)
    torch.set_num_threads(1)
    heads = ("strategy", "synchr.", "equal", "difference", "last digest", "server", "s")
    print(COLUMNS.format(*heads))
    equal = True
    for name, events in _runs(options):
        began = perf_counter()
        try:
            pair = compare(name, steps=options.steps, nodes=options.nodes, events=events)
            served = None
            if name in SERVED and not events:
                served = serve(name, steps=options.steps, nodes=options.nodes)
        except SettingsError as error:
            print(error, file=sys.stderr)
            return 2
        equal = equal and pair.equal and len(pair.real.heals) == len(events) // 2
        equal = equal and (served is None or served.equal)
        label, seconds = f"{name}, killed" if events else name, perf_counter() - began
        print(_line(label, pair, served, seconds), flush=True)
    return 0 if equal else 1


def _runs(options: argparse.Namespace) -> Iterator[tuple[str, list[Event]]]:
    """Strategies, and what happens to their nodes."""
    asked = options.strategy or list(STRATEGIES)
    for name in asked:
        yield name, []
    last, third = options.nodes - 1, options.steps // 3
    for name in asked:
        if name in WITH_A_KILL and options.kill:
            yield name, [Dies(last, third, in_round=True), Joins(last, 2 * third)]


if __name__ == "__main__":
    sys.exit(main())
