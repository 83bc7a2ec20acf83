"""What it costs in learning to communicate less: held-out losses of a small language model.

Four simulated nodes learn the bytes of Python's standard library: by all-reduce in every step, by
DiLoCo, and by Streaming DiLoCo, four fragments of which each travels for a quarter of H while
training goes on. Each sends fp32, int8 and int4. All see the same bytes in the same order from the
same weights, so that what differs is the strategy. A loss is that of the mean of the nodes' models
on text that nobody trained on; it and the gaps are means over seeds, ± their standard deviation. A
gap is taken seed by seed, and below 0 where less communication has learned more.

The rates were tuned once, for DiLoCo in fp32 on a seed of its own, and serve all alike.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from torch import Tensor, nn

from torchft import strategies
from torchft.experiments import datasets
from torchft.experiments.models import Gpt
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import run_stacked
from torchft.strategies import OptimSpec, Strategy

NODES, FRAGMENTS = 4, 4
CODECS = {"fp32": None, "int8": "int8", "int4": "int4"}

INNER = OptimSpec(torch.optim.AdamW, lr=2e-3)
OUTER = OptimSpec(torch.optim.SGD, lr=0.4, momentum=0.9, nesterov=True)
ALPHA = 0.5
"""Of Streaming: what is learned while a fragment travels counts half, as in the paper."""


@dataclass(frozen=True)
class Options:
    """How much is learned."""

    steps: int = option(320, "inner steps of each node")
    every: int = option(40, "H, and the steps in which the inner rate rises")
    batch: int = option(8, "rows of 64 bytes in a step of a node")
    seeds: int = option(3, "runs of each strategy and codec")
    held_out: int = option(2048, "rows that a loss is taken on")


@dataclass(frozen=True)
class Trained:
    """One strategy with one codec."""

    losses: list[float]
    """Nats a byte, by seed."""
    bytes_of_a_node: int

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.losses)

    def gap_to(self, other: Trained) -> list[float]:
        """Per cent above the other's loss, by seed."""
        pairs = zip(self.losses, other.losses, strict=True)
        return [100 * (mine / theirs - 1) for mine, theirs in pairs]


def measure(options: Options) -> Findings:
    """All in this process, on one thread."""
    train, held_out = datasets.text()
    rows = held_out[:: max(1, len(held_out) // options.held_out)][: options.held_out]
    found = {
        (name, codec): _trained(name, codec, train, rows, options)
        for name in STRATEGIES
        for codec in CODECS
    }
    details = {f"{name}.{codec}": vars(one) for (name, codec), one in found.items()}
    return Findings([*_losses(found), *_gaps(found)], details)


def _trained(name: str, codec: str, train: Tensor, rows: Tensor, options: Options) -> Trained:
    losses = []
    for seed in range(1, options.seeds + 1):
        experiment = Experiment(
            model=Gpt,
            train_dataset=train,
            strategy=STRATEGIES[name](options, CODECS[codec]),
            num_nodes=NODES,
            max_steps=options.steps,
            batch_size=options.batch,
            seed=seed,
            device="cpu",
        )
        result = run_stacked(experiment)
        assert result.model is not None
        losses.append(held_out_loss(result.model, rows))
        print(f"{name}, {codec}, seed {seed}: {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return Trained(losses, result.bytes_sent[0])


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """Mean over the rows, in nats a byte."""
    model.eval()
    return sum(float(model(part)) * len(part) for part in rows.split(256)) / len(rows)


# ---------------------------------------------------------------------- figures

Found = dict[tuple[str, str], Trained]


def _losses(found: Found) -> Iterator[Figure]:
    plain = found["all_reduce", "fp32"]
    for (name, codec), one in found.items():
        floor = None if one is plain else Floor("all-reduce, fp32", plain.loss)
        title = f"held-out loss, {TITLES[name]}, {codec}"
        key = f"learning.{name}.{codec}"
        yield Figure(key, title, one.loss, "nats", floor, _spread(one.losses))


def _gaps(found: Found) -> Iterator[Figure]:
    """To the same strategy in fp32; and the one that has a goal, to DiLoCo in fp32."""
    pairs = [((name, codec), (name, "fp32")) for name, codec in found if codec != "fp32"]
    pairs.append((("streaming", "int8"), ("diloco", "fp32")))
    for (name, codec), (other, base) in pairs:
        gaps = found[name, codec].gap_to(found[other, base])
        title = f"gap of {TITLES[name]}, {codec}, to {TITLES[other]}, {base}"
        key = f"learning.gap.{name}.{codec}.{other}"
        yield Figure(key, title, statistics.fmean(gaps), "%", spread=_spread(gaps))


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


# ---------------------------------------------------------------------- strategies


def _common(options: Options, codec: str | None) -> dict[str, Any]:
    return {
        "optim_spec": INNER,
        "max_norm": 1.0,
        "lr_scheduler": "lambda_cosine",
        "lr_scheduler_kwargs": {"warmup_steps": options.every, "cosine_anneal": True},
        "codec": codec,
    }


def _all_reduce(options: Options, codec: str | None) -> Strategy:
    return strategies.SimpleReduceStrategy(**_common(options, codec))


def _diloco(options: Options, codec: str | None) -> Strategy:
    return strategies.DiLoCoStrategy(
        H=options.every, outer_optim_spec=OUTER, **_common(options, codec)
    )


def _streaming(options: Options, codec: str | None) -> Strategy:
    return strategies.StreamingDiLoCoStrategy(
        H=options.every,
        fragments=FRAGMENTS,
        fragment_sync_delay=options.every // 4,
        fragment_update_alpha=ALPHA,
        outer_optim_spec=OUTER,
        **_common(options, codec),
    )


STRATEGIES: dict[str, Callable[[Options, str | None], Strategy]] = {
    "all_reduce": _all_reduce,
    "diloco": _diloco,
    "streaming": _streaming,
}
TITLES = {"all_reduce": "all-reduce", "diloco": "DiLoCo", "streaming": "Streaming DiLoCo"}

QUICK = Options(steps=4, every=4, batch=2, seeds=1, held_out=16)

if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run("learning", __doc__, Options(), QUICK, measure))
