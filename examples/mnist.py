"""Try distributed training on pictures of digits: N nodes in this one process, any strategy.

    python3 examples/mnist.py                                 DiLoCo, four nodes, some seconds
    python3 examples/mnist.py --strategy sparta --nodes 8
    python3 examples/mnist.py --table --plot                  five strategies, three seeds each

The pictures are MNIST's with `--data FOLDER`, which holds MNIST/raw, or `--download`; else, and
where the download fails, scikit-learn's digits. Tables and plots are written to runs/mnist.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pictures import NotThere, Pictures, digits, mnist
from torch import Tensor, nn
from torch.nn import functional

from torchft.arguments import at_least
from torchft.errors import SettingsError
from torchft.experiments import Trainer, describe_machine
from torchft.simulator import Result
from torchft.strategies import (
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    LocalSGDStrategy,
    OptimSpec,
    SimpleReduceStrategy,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    Strategy,
    StreamingDiLoCoStrategy,
    TopKStrategy,
)

NODES = 4
STEPS = 150  # of each node
BATCH = 64  # pictures of each node in a step
LR = 1e-3  # AdamW; DeMo, which steps by signs, has it too
WARMUP = 0.1  # of the steps; then a cosine to a tenth of the rate
H = 20  # steps between two rounds, where a strategy has such
P_SPARTA = 0.005  # of the weights, in every step
POINTS = 10  # on a curve
SEEDS = 3  # of each row of the table
OUT = Path("runs/mnist")


@dataclass(frozen=True)
class Settings:
    """Of one run. Runs that differ in strategy alone see equal pictures at equal rates."""

    strategy: str = "diloco"
    nodes: int = NODES
    steps: int = STEPS
    batch: int = BATCH
    lr: float = LR
    H: int = H
    model: str = "cnn"
    device: str | None = None
    seed: int = 1


# ---------------------------------------------------------------------- what is trained, and how


class Classifier(nn.Module):
    """(pictures, labels) → loss: all that the simulator asks of a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        pictures, labels = batch
        return functional.cross_entropy(self.net(pictures), labels)


def cnn() -> nn.Module:
    """Two strided convolutions with BatchNorm, whose running means are each node's own."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def mlp() -> nn.Module:
    """784-256-128-10."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 256), nn.ReLU()),
        *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


MODELS = {"cnn": cnn, "mlp": mlp}

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "allreduce": lambda s, **inner: SimpleReduceStrategy(**inner),
    "fedavg": lambda s, **inner: FedAvgStrategy(H=s.H, **inner),
    "diloco": lambda s, **inner: DiLoCoStrategy(H=s.H, **inner),
    "sparta": lambda s, **inner: SPARTAStrategy(p_sparta=P_SPARTA, **inner),
    "demo": lambda s, **inner: DeMoStrategy(**inner),
    "localsgd": lambda s, **inner: LocalSGDStrategy(H=s.H, **inner),
    "streaming": lambda s, **inner: StreamingDiLoCoStrategy(H=s.H, fragments=4, **inner),
    "topk": lambda s, **inner: TopKStrategy(H=s.H, **inner),
    "sparta_diloco": lambda s, **inner: SPARTADiLoCoStrategy(p_sparta=P_SPARTA, H=s.H, **inner),
}
FIVE = ("allreduce", "fedavg", "diloco", "sparta", "demo")
"""The table's rows."""


def make_strategy(settings: Settings) -> Strategy:
    """A new one: each serves one run."""
    optim = torch.optim.SGD if settings.strategy == "demo" else torch.optim.AdamW
    return STRATEGIES[settings.strategy](
        settings,
        optim_spec=OptimSpec(optim, lr=settings.lr),
        lr_scheduler="lambda_cosine",
        lr_scheduler_kwargs={
            "warmup_steps": max(1, int(settings.steps * WARMUP)),
            "cosine_anneal": True,
        },
    )


def train(
    settings: Settings, pictures: Pictures, *, points: int = 1, quiet: bool = False
) -> Result:
    """Simulate one run, and look at the held-out loss `points` times on the way."""
    torch.manual_seed(settings.seed)
    model = Classifier(MODELS[settings.model]())
    trainer = Trainer(model, pictures.train, pictures.held_out, device=settings.device)
    trainer.fit(
        num_epochs=settings.steps,  # the steps end first
        max_steps=settings.steps,
        strategy=make_strategy(settings),
        num_nodes=settings.nodes,
        batch_size=settings.batch,
        minibatch_size=settings.batch,
        val_size=len(pictures.held_out),
        val_interval=max(1, settings.steps // points),
        seed=settings.seed,
        disable_logging=quiet,
        logger="none",
    )
    return trainer.result


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """One strategy over several seeds."""

    strategy: str
    losses: list[float]
    seconds: float
    steps_per_s: float
    lr: float

    @classmethod
    def of(cls, strategy: str, results: Sequence[Result]) -> Row:
        """Means, but every loss."""
        seconds = [result.seconds["steps"] for result in results]
        steps = [len(result.history) for result in results]
        return cls(
            strategy,
            [final_loss(result) for result in results],
            statistics.fmean(seconds),
            sum(steps) / sum(seconds),
            results[0].history[-1].lr,
        )

    def cells(self) -> tuple[str, ...]:
        """As text."""
        loss = f"{statistics.fmean(self.losses):.4f}"
        if len(self.losses) > 1:  # one seed has no spread
            loss += f" ± {statistics.stdev(self.losses):.4f}"
        return (
            self.strategy,
            loss,
            f"{self.seconds:.1f} s",
            f"{self.steps_per_s:.1f}",
            f"{self.lr:.2e}",
        )


HEADER = ("strategy", "final loss", "training time", "it/s", "final LR")


def final_loss(result: Result) -> float:
    """Of the mean of all nodes' models, on the held-out pictures."""
    return float(result.validations[-1]["global_loss"])


def as_markdown(rows: Sequence[Row], caption: str) -> str:
    """A table that is readable as it stands, too."""
    cells = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([caption, "", *lines]) + "\n"


def plot(results: dict[str, list[Result]], path: Path) -> None:
    """Held-out loss against steps, a line a strategy: the mean over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for strategy, runs in results.items():
        steps = [one["step"] for one in runs[0].validations]
        losses = zip(
            *([one["global_loss"] for one in run.validations] for run in runs), strict=True
        )
        axes.plot(steps, [statistics.fmean(of) for of in losses], label=strategy)
    axes.set(xlabel="steps of each node", ylabel="held-out loss", yscale="log")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


# ---------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    arguments = command_line(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    pictures = find_pictures(arguments)
    print(f"Pictures: {pictures.name}", flush=True)
    names = FIVE if arguments.table else (arguments.strategy,)
    seeds = range(1, arguments.seeds + 1)
    results: dict[str, list[Result]] = {}
    for name in names:
        given = {key: getattr(arguments, key) for key in GIVEN}
        settings = [Settings(strategy=name, seed=seed, **given) for seed in seeds]
        points = POINTS if arguments.plot else 1
        results[name] = [
            train(one, pictures, points=points, quiet=len(names) > 1) for one in settings
        ]
        report(name, results[name])
    if arguments.table or arguments.plot:
        write(results, arguments, pictures)


def write(results: dict[str, list[Result]], arguments: argparse.Namespace, on: Pictures) -> None:
    """What was asked for."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.table:
        rows = [Row.of(*one) for one in results.items()]
        text = as_markdown(rows, caption(arguments, on))
        print(f"\n{text}")
        (arguments.out / "table.md").write_text(text)
    if arguments.plot:
        plot(results, arguments.out / "loss.png")
    print(f"Written to {arguments.out}")


def report(name: str, results: Sequence[Result]) -> None:
    for seed, result in enumerate(results, start=1):
        sent = max(result.bytes_sent) / 1e6
        print(
            f"{name}, seed {seed}: held-out loss {final_loss(result):.4f} in "
            f"{result.seconds['steps']:.1f} s; each node sent {sent:.1f} MB",
            flush=True,
        )


def caption(arguments: argparse.Namespace, pictures: Pictures) -> str:
    seen = arguments.nodes * arguments.steps * arguments.batch
    several = f"mean ± standard deviation of {arguments.seeds} seeds"
    seeds = several if arguments.seeds > 1 else "one seed"
    return (
        f"{pictures.name}; {arguments.model}, {arguments.nodes} nodes, {arguments.steps} steps of "
        f"{arguments.batch} pictures each ({seen} in all), H = {arguments.H}, {seeds}. Measured on "
        f"{describe_machine(arguments.device or None)}."
    )


def find_pictures(arguments: argparse.Namespace) -> Pictures:
    """MNIST where it was asked for and is; else the digits, said aloud."""
    if arguments.data is None and not arguments.download:
        print("No --data and no --download: this is not MNIST", flush=True)
        return digits()
    try:
        return mnist(arguments.data or OUT / "data", download=arguments.download)
    except NotThere as error:
        if not arguments.download:
            sys.exit(f"{error}\nGive the folder that holds MNIST/raw, or add --download")
        print(f"MNIST cannot be had: {error}", file=sys.stderr, flush=True)
        return digits()


GIVEN = ("nodes", "steps", "batch", "lr", "H", "model", "device")
"""Flags that are settings of every run."""


def command_line(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag: Callable[..., Any] = parser.add_argument
    flag("--strategy", choices=STRATEGIES, default="diloco", help="(diloco)")
    flag("--nodes", type=at_least(1), default=NODES, metavar="N", help=f"({NODES})")
    flag("--steps", type=at_least(1), default=STEPS, metavar="N", help=f"of each node ({STEPS})")
    flag("--batch", type=at_least(1), default=BATCH, metavar="N", help=f"of each node ({BATCH})")
    flag("--lr", type=float, default=LR, help=f"before the schedule ({LR:g})")
    flag("--H", type=at_least(1), default=H, metavar="N", help=f"steps between rounds ({H})")
    flag("--model", choices=MODELS, default="cnn", help="(cnn)")
    flag("--device", help="cpu, cuda, cuda:1, mps (the best there is)")
    flag("--seeds", type=at_least(1), metavar="N", help=f"runs (1; {SEEDS} with --table)")
    flag("--data", type=Path, metavar="FOLDER", help="holds MNIST/raw, as torchvision keeps it")
    flag("--download", action="store_true", help="fetch MNIST by torchvision")
    flag("--table", action="store_true", help=f"compare {', '.join(FIVE)}")
    flag("--plot", action="store_true", help="held-out loss against steps, as a picture")
    flag("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for table and plot ({OUT})")
    arguments = parser.parse_args(argv)
    arguments.seeds = arguments.seeds or (SEEDS if arguments.table else 1)
    return arguments


if __name__ == "__main__":
    try:
        main()
    except SettingsError as error:
        sys.exit(f"mnist.py: {error}")
