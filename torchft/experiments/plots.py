"""Pictures of a sweep: the loss against steps, bytes and simulated time.

A line for each combination: the mean training loss, averaged over a few steps and over the seeds;
the shade is from the lowest seed to the highest. Dots are the mean model on held-out samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.experiments.config import needed
from torchft.experiments.runs import RunReport, RunSpec
from torchft.experiments.sweep import Sweep
from torchft.experiments.tables import MEGA, WINDOW, grouped
from torchft.simulator.network import NetworkModel
from torchft.simulator.simulated_time import smoothed

__all__ = ["Line", "lines_of", "write_plots"]

Axis = Callable[[RunReport], Sequence[float]]
"""What a run has come to at the end of each step."""


@dataclass(frozen=True)
class Line:
    """The points of one combination of settings along one axis."""

    label: str
    x: list[float]
    loss: list[float]
    lowest: list[float]
    highest: list[float]
    looks: list[tuple[float, float]]
    """Where the mean model was validated, and its loss."""


def lines_of(sweep: Sweep, axis: Axis) -> list[Line]:
    """One line of points for each combination of settings."""
    groups = grouped(sweep.reports)
    return [_line(_label(group, list(groups)), reports, axis) for group, reports in groups.items()]


def _line(label: str, reports: Sequence[RunReport], axis: Axis) -> Line:
    x = _means([axis(report) for report in reports])
    losses = [smoothed(report.train_losses, WINDOW) for report in reports]
    known = [at for at, loss in enumerate(losses[0]) if math.isfinite(loss)]
    by_step = [[seed[at] for seed in losses] for at in known]
    looks = _means([[loss for _, loss in report.validations] for report in reports])
    steps = [step for step, _ in reports[0].validations]
    return Line(
        label=label,
        x=[x[at] for at in known],
        loss=[sum(values) / len(values) for values in by_step],
        lowest=[min(values) for values in by_step],
        highest=[max(values) for values in by_step],
        looks=[(x[step - 1], loss) for step, loss in zip(steps, looks, strict=True) if step],
    )


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def _label(group: RunSpec, groups: Sequence[RunSpec]) -> str:
    """The strategy, and what else tells it from the others."""
    label = group.strategy.shown
    if len({other.nodes for other in groups}) > 1:
        label += f", {group.nodes} nodes"
    if group.sync_every is not None and len({other.sync_every for other in groups} - {None}) > 1:
        label += f", every {group.sync_every}"
    if len({other.lr for other in groups}) > 1:
        label += f", lr {group.lr:g}"
    return label


def write_plots(sweep: Sweep, folder: Path) -> list[Path]:
    """PNG files. Without a run that ended there is nothing to draw.

    Raises:
        SettingsError: matplotlib is not installed.
    """
    if not sweep.reports:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _draw(lines_of(sweep, _steps), "steps of each node", folder / "loss_by_steps.png"),
        _draw(
            lines_of(sweep, _megabytes), "MB sent by a node", folder / "loss_by_bytes.png", log=True
        ),
    ]
    for name, network in sweep.config.all_networks.items():
        suffix = "" if name == "network" else f"_{name}"
        path = folder / f"loss_by_time{suffix}.png"
        written.append(_draw(lines_of(sweep, _seconds(network)), "simulated seconds", path))
    return written


def _steps(report: RunReport) -> Sequence[float]:
    return range(1, len(report.losses) + 1)


def _megabytes(report: RunReport) -> Sequence[float]:
    return [sent / MEGA for sent in report.bytes_by_step]


def _seconds(network: NetworkModel) -> Axis:
    return lambda report: report.forecast(network).step_ends_s


def _draw(lines: Sequence[Line], axis: str, path: Path, *, log: bool = False) -> Path:
    # Figures by hand: pyplot would choose a window system, and keep them all.
    figure = needed("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for line in lines:
        (drawn,) = axes.plot(line.x, line.loss, label=line.label, linewidth=1.3)
        colour = drawn.get_color()
        axes.fill_between(line.x, line.lowest, line.highest, color=colour, alpha=0.2, linewidth=0)
        if line.looks:
            axes.plot(*zip(*line.looks, strict=True), "o", color=colour, markersize=3)
    if log and any(x > 0 for line in lines for x in line.x):
        axes.set_xscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel("loss (line: training, dots: mean model, held out)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path
