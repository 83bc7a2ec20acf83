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

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.cli import Findings, option, run
from harness.figures import Figure

NODES = 4
SHARES = (1, 2, 4, 8)
"""Of the images, by node, for FedAvg."""


@dataclass(frozen=True)
class Options:
    """How much is learned."""

    steps: int = option(200, "inner steps of each node")
    every: int = option(10, "H")
    batch: int = option(32, "images in a step of a node")
    images: int = option(7500, "that are trained on")
    seeds: int = option(3, "runs of each variant")
    held_out: int = option(2048, "images that a loss is taken on")


Make = Callable[[Options], Any]


def _top_k(mean_over: str, chunks_of: str) -> Make:
    def make(options: Options) -> Any:
        from torchft.strategies import TopKStrategy

        return TopKStrategy("adamw", H=options.every, mean_over=mean_over, chunks_of=chunks_of)

    return make


def _demo(mean_over: str) -> Make:
    def make(options: Options) -> Any:
        from torchft.strategies import DeMoStrategy

        return DeMoStrategy(mean_over=mean_over)

    return make


def _fedavg(weighting: str) -> Make:
    def make(options: Options) -> Any:
        from torchft.strategies import FedAvgStrategy

        return FedAvgStrategy("adamw", H=options.every, weighting=weighting)

    return make


VARIANTS: dict[str, Make] = {
    "top-k, members, model": _top_k("members", "model"),
    "top-k, members, tensor": _top_k("members", "tensor"),
    "top-k, senders, model": _top_k("senders", "model"),
    "top-k, senders, tensor": _top_k("senders", "tensor"),
    "DeMo, members": _demo("members"),
    "DeMo, senders": _demo("senders"),
    "FedAvg, equal": _fedavg("equal"),
    "FedAvg, samples": _fedavg("samples"),
}


def measure(options: Options) -> Findings:
    """All in this process, on one thread."""
    import torch

    from torchft.experiments import datasets

    torch.set_num_threads(1)
    data = datasets.digits(options.images, options.held_out)
    found = {name: _trained(name, *data, options) for name in VARIANTS}
    figures = [_figure(name, losses) for name, losses in found.items()]
    return Findings(figures, {"losses": found})


def _figure(name: str, losses: list[float]) -> Figure:
    spread = statistics.stdev(losses) if len(losses) > 1 else None
    key = "variants." + name.replace(", ", ".")
    return Figure(key, f"held-out loss, {name}", statistics.fmean(losses), "nats", spread=spread)


def _trained(name: str, train: Any, held_out: Any, options: Options) -> list[float]:
    import torch

    from torchft.experiments.models import Mlp
    from torchft.simulator.experiment import Experiment
    from torchft.simulator.loop import run_stacked

    losses = []
    for seed in range(1, options.seeds + 1):
        torch.manual_seed(seed)
        experiment = Experiment(
            model=Mlp(),
            train_dataset=_shards(train) if name.startswith("FedAvg") else train,
            strategy=VARIANTS[name](options),
            num_nodes=NODES,
            max_steps=options.steps,
            batch_size=options.batch,
            seed=seed,
            device="cpu",
        )
        model = run_stacked(experiment).model
        assert model is not None
        with torch.no_grad():
            losses.append(float(model.eval()(held_out.tensors)))
        print(f"{name}, seed {seed}: {losses[-1]:.4f}", file=sys.stderr, flush=True)
    return losses


def _shards(train: Any) -> Callable[..., Any]:
    """A factory of unequal shards."""
    from torch.utils.data import Subset

    def shard(rank: int, num_nodes: int, is_training: bool) -> Any:
        bounds = [len(train) * sum(SHARES[:node]) // sum(SHARES) for node in range(num_nodes + 1)]
        return Subset(train, range(bounds[rank], bounds[rank + 1]))

    return shard


QUICK = Options(steps=2, every=2, batch=2, images=60, seeds=1, held_out=16)

if __name__ == "__main__":
    raise SystemExit(run("variants", __doc__, Options(), QUICK, measure))
