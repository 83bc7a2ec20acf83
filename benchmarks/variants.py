"""What the readings of a recipe learn, where a paper and its authors' code differ.

Four simulated nodes learn scikit-learn's digits, enlarged (the model mlp): each variant sees the
same images in the same order from the same weights, and as many of them. A loss is that of the mean
of the nodes' models on images that nobody trained on, in nats; it is a mean over seeds, ± their
standard deviation.

    top-k      the mean over all members (paper) or over the senders of a number (code), of chunks
               of the model or of each tensor (code); H = 10
    DeMo       the mean over all members or over the senders of a coefficient (code)
    FedAvg     shards of 1 : 2 : 4 : 8; every node weighs the same (code), or by its samples (paper)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness.cli import Findings, option, run
from harness.figures import Figure
from harness.simulating import learned
from harness.small_work import Work
from torch.utils.data import Subset

from torchft import strategies
from torchft.experiments import datasets
from torchft.experiments.models import Mlp

NODES = 4
SHARES = (1, 2, 4, 8)
"""Of the images, by node, for FedAvg."""


@dataclass(frozen=True)
class Options:
    """How much is learned."""

    steps: int = option(200, "inner steps of each node")
    sync_every: int = option(10, "H")
    batch: int = option(32, "images in a step of a node")
    images: int = option(7500, "that are trained on")
    seeds: int = option(3, "runs of each variant")
    held_out: int = option(2048, "images that a loss is taken on")


def _make(kind: Callable[..., Any], settings: dict[str, str], options: Options) -> Any:
    if kind is not strategies.DeMoStrategy:
        return kind("adamw", H=options.sync_every, **settings)
    return kind(**settings)


VARIANTS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    **{
        f"top-k, {mean_over}, {chunks_of}": (
            strategies.TopKStrategy,
            {"mean_over": mean_over, "chunks_of": chunks_of},
        )
        for mean_over in ("members", "senders")
        for chunks_of in ("model", "tensor")
    },
    **{
        f"DeMo, {mean_over}": (strategies.DeMoStrategy, {"mean_over": mean_over})
        for mean_over in ("members", "senders")
    },
    **{
        f"FedAvg, {weighting}": (strategies.FedAvgStrategy, {"weighting": weighting})
        for weighting in ("equal", "samples")
    },
}


def measure(options: Options) -> Findings:
    """All in this process, on one thread."""
    torch.set_num_threads(1)
    data = datasets.digits(options.images, options.held_out)
    task = Work("mlp", Mlp, lambda: data, options.batch)
    found = {}
    for name, (kind, settings) in VARIANTS.items():
        train = _shards(data[0]) if name.startswith("FedAvg") else data[0]
        found[name] = learned(
            name,
            task,
            partial(_make, kind, settings, options),
            seeds=options.seeds,
            rows=options.held_out,
            train_dataset=train,
            num_nodes=NODES,
            max_steps=options.steps,
        ).losses
    figures = [
        Figure.mean(f"variants.{name.replace(', ', '.')}", f"held-out loss, {name}", losses, "nats")
        for name, losses in found.items()
    ]
    return Findings(figures, {"losses": found})


def _shards(train: Any) -> Callable[..., Any]:
    """A factory of unequal shards."""

    def shard(rank: int, num_nodes: int, is_training: bool) -> Any:
        bounds = [len(train) * sum(SHARES[:node]) // sum(SHARES) for node in range(num_nodes + 1)]
        return Subset(train, range(bounds[rank], bounds[rank + 1]))

    return shard


QUICK = Options(steps=2, sync_every=2, batch=2, images=60, seeds=1, held_out=16)

if __name__ == "__main__":
    raise SystemExit(run("variants", __doc__, Options(), QUICK, measure))
