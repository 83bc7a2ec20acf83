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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from harness.cli import Findings, option, run
from harness.figures import Figure, Floor, gaps
from harness.simulating import Trained, learned
from harness.small_work import work

from torchft import strategies
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
    sync_every: int = option(40, "H, and the steps in which the inner rate rises")
    batch: int = option(8, "rows of 64 bytes in a step of a node")
    seeds: int = option(3, "runs of each strategy and codec")
    held_out: int = option(2048, "rows that a loss is taken on")


def measure(options: Options) -> Findings:
    """All in this process, on one thread."""
    torch.set_num_threads(1)
    task = replace(work("bytes"), batch=options.batch)
    found = {
        (name, codec): learned(
            f"{name}, {codec}",
            task,
            partial(STRATEGIES[name], options, CODECS[codec]),
            seeds=options.seeds,
            rows=options.held_out,
            model=task.model,
            num_nodes=NODES,
            max_steps=options.steps,
        )
        for name in STRATEGIES
        for codec in CODECS
    }
    details = {f"{name}.{codec}": one for (name, codec), one in found.items()}
    return Findings([*_losses(found), *_gaps(found)], details)


# ---------------------------------------------------------------------- figures

Found = dict[tuple[str, str], Trained]


def _losses(found: Found) -> Iterator[Figure]:
    plain = found["all_reduce", "fp32"]
    for (name, codec), one in found.items():
        floor = None if one is plain else Floor("all-reduce, fp32", statistics.fmean(plain.losses))
        title = f"held-out loss, {TITLES[name]}, {codec}"
        yield Figure.mean(f"learning.{name}.{codec}", title, one.losses, "nats", floor)


def _gaps(found: Found) -> Iterator[Figure]:
    """To the same strategy in fp32; and the one that has a goal, to DiLoCo in fp32."""
    pairs = [((name, codec), (name, "fp32")) for name, codec in found if codec != "fp32"]
    pairs.append((("streaming", "int8"), ("diloco", "fp32")))
    for (name, codec), (other, base) in pairs:
        above = gaps(found[name, codec].losses, found[other, base].losses)
        title = f"gap of {TITLES[name]}, {codec}, to {TITLES[other]}, {base}"
        yield Figure.mean(f"learning.gap.{name}.{codec}.{other}", title, above, "%")


# ---------------------------------------------------------------------- strategies


def _strategy(kind: Callable[..., Strategy], options: Options, codec: str | None) -> Strategy:
    settings: dict[str, Any] = {}
    if kind is not strategies.SimpleReduceStrategy:
        settings |= {"H": options.sync_every, "outer_optim_spec": OUTER}
    if kind is strategies.StreamingDiLoCoStrategy:
        settings |= {"fragments": FRAGMENTS, "delay": options.sync_every // 4}
        settings |= {"mix": ALPHA}
    return kind(
        optim_spec=INNER,
        max_norm=1.0,
        lr_scheduler="lambda_cosine",
        lr_scheduler_kwargs={"warmup_steps": options.sync_every, "cosine_anneal": True},
        codec=codec,
        **settings,
    )


STRATEGIES: dict[str, Callable[[Options, str | None], Strategy]] = {
    "all_reduce": partial(_strategy, strategies.SimpleReduceStrategy),
    "diloco": partial(_strategy, strategies.DiLoCoStrategy),
    "streaming": partial(_strategy, strategies.StreamingDiLoCoStrategy),
}
TITLES = {"all_reduce": "all-reduce", "diloco": "DiLoCo", "streaming": "Streaming DiLoCo"}

QUICK = Options(steps=4, sync_every=4, batch=2, seeds=1, held_out=16)

if __name__ == "__main__":
    raise SystemExit(run("learning", __doc__, Options(), QUICK, measure))
