"""What a sweep found: a row for each combination, the seeds together, as table, CSV and JSON."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.experiments.config import difference, needed, whole
from torchft.experiments.machine import describe_machine
from torchft.experiments.runs import RunReport, RunSpec
from torchft.experiments.sweep import Sweep
from torchft.simulator.simulated_time import Forecast, smoothed

__all__ = [
    "TableRow",
    "as_csv",
    "as_table",
    "grouped",
    "rows_of",
    "target_of",
    "with_machine",
    "write_tables",
]

WINDOW = 10
"""Steps over which a training loss is averaged."""
MEGA = 1e6


@dataclass(frozen=True)
class MeanSpread:
    """The mean and the spread of a figure over several seeds."""

    mean: float
    spread: float | None
    """Standard deviation; None: of one seed there is none."""

    def __str__(self) -> str:
        shown = f"{self.mean:.4g}"
        return shown if self.spread is None else f"{shown} ± {self.spread:.2g}"


@dataclass(frozen=True)
class NetworkFigures:
    """The figures of one combination of settings on one network."""

    elapsed_s: MeanSpread
    to_loss_s: MeanSpread | None
    """None: not every seed reached it."""
    utilisation: MeanSpread
    lost_node_steps: MeanSpread


@dataclass(frozen=True)
class TableRow:
    """The figures of one combination of settings, over all seeds."""

    spec: RunSpec
    seeds: int
    loss: MeanSpread
    """Of the mean model on held-out samples at the end."""
    train_loss: MeanSpread
    """Of the last steps."""
    megabytes: MeanSpread
    """That a node sent."""
    steps_per_s: MeanSpread
    """Here, in wall time."""
    networks: dict[str, NetworkFigures]

    def plain(self) -> dict[str, Any]:
        """The row as a flat dict of names and numbers."""
        spec = self.spec
        flat: dict[str, Any] = {
            "strategy": spec.strategy.shown,
            "nodes": spec.nodes,
            "sync_every": spec.sync_every,
            "lr": spec.lr,
            "steps": spec.steps,
            "seeds": self.seeds,
        }
        figures: dict[str, MeanSpread | None] = {
            "loss": self.loss,
            "train_loss": self.train_loss,
            "megabytes_per_node": self.megabytes,
            "steps_per_s": self.steps_per_s,
        }
        for network, found in self.networks.items():
            figures |= {f"{network}_{name}": figure for name, figure in vars(found).items()}
        for name, figure in figures.items():
            flat[name] = None if figure is None else figure.mean
            flat[f"{name}_spread"] = None if figure is None else figure.spread
        return flat


def grouped(reports: Iterable[RunReport]) -> dict[RunSpec, list[RunReport]]:
    """The seeds of each combination together."""
    groups: dict[RunSpec, list[RunReport]] = {}
    for report in reports:
        groups.setdefault(report.spec.group, []).append(report)
    return groups


def target_of(sweep: Sweep) -> float | None:
    """The training loss that time is measured to: the given one, or the lowest that all runs
    reached; None without a run."""
    if sweep.config.target_loss is not None:
        return sweep.config.target_loss
    return max((min(smoothed(r.train_losses, WINDOW)) for r in sweep.reports), default=None)


def rows_of(sweep: Sweep) -> list[TableRow]:
    """A row for each combination of which at least one seed ended."""
    target = target_of(sweep)
    return [
        TableRow(
            spec=group,
            seeds=len(reports),
            loss=_figure(report.final_loss for report in reports),
            train_loss=_figure(smoothed(r.train_losses, WINDOW)[-1] for r in reports),
            megabytes=_figure(report.bytes_per_node / MEGA for report in reports),
            steps_per_s=_figure(report.steps_per_s for report in reports),
            networks={
                name: _on_network([report.forecast(network) for report in reports], target)
                for name, network in sweep.config.all_networks.items()
            },
        )
        for group, reports in grouped(sweep.reports).items()
    ]


def _on_network(simulated: Sequence[Forecast], target: float | None) -> NetworkFigures:
    assert target is not None  # there is a run
    times = [run.time_to_loss(target, window=WINDOW) for run in simulated]
    reached = [time for time in times if time is not None]
    return NetworkFigures(
        elapsed_s=_figure(run.elapsed_s for run in simulated),
        to_loss_s=_figure(reached) if len(reached) == len(times) else None,
        utilisation=_figure(run.utilisation for run in simulated),
        lost_node_steps=_figure(run.lost.node_steps for run in simulated),
    )


def _figure(values: Iterable[float]) -> MeanSpread:
    values = list(values)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return MeanSpread(statistics.fmean(values), spread)


def with_machine(sweep: Sweep, rows: Sequence[TableRow]) -> str:
    """The table, and above it the machine that its it/s are of."""
    table = as_table(rows, target_of(sweep))
    return f"{describe_machine(sweep.config.device)}\n\n{table}"


def as_table(rows: Sequence[TableRow], target: float | None) -> str:
    """The rows as a table in Markdown, for people."""
    head, cells = _heads(rows, target), [_cells(row) for row in rows]
    # What never happened, or is the same everywhere by default, needs no column.
    kept = [
        at
        for at, name in enumerate(head)
        if not name.startswith("lost") or any(line[at] != "0" for line in cells)
    ]
    table = [[line[at] for at in kept] for line in [head, *cells]]
    widths = [max(len(line[at]) for line in table) for at in range(len(kept))]
    lines = [_line(line, widths) for line in table]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def _heads(rows: Sequence[TableRow], target: float | None) -> list[str]:
    heads = ["strategy", "nodes", "sync_every", "lr", "steps", "seeds", "loss", "MB/node", "it/s"]
    for name in rows[0].networks if rows else ():
        at = "" if name == "network" else f" ({name})"
        heads += [f"s to loss {target:.3g}{at}", f"utilised{at}", f"lost node-steps{at}"]
    return heads


def _cells(row: TableRow) -> list[str]:
    spec = row.spec
    sync_every = "" if spec.sync_every is None else str(spec.sync_every)
    cells = [spec.strategy.shown, str(spec.nodes), sync_every, f"{spec.lr:g}"]
    cells += [str(spec.steps), str(row.seeds)]
    cells += [str(row.loss), str(row.megabytes), f"{row.steps_per_s.mean:.0f}"]
    for found in row.networks.values():
        cells.append("never" if found.to_loss_s is None else str(found.to_loss_s))
        cells += [f"{found.utilisation.mean:.0%}", f"{found.lost_node_steps.mean:.0f}"]
    return cells


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if at == 0 else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "| " + " | ".join([first, *others]) + " |"


def as_csv(rows: Sequence[TableRow]) -> str:
    """The rows as CSV with every figure, for machines."""
    plain = [row.plain() for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(plain[0]) if plain else ["strategy"])
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue()


def write_tables(sweep: Sweep, rows: Sequence[TableRow], folder: Path) -> None:
    """`table.md` with the machine above it, `table.csv`, and the configuration: `config.yaml`, and
    in `difference.yaml` only what is not by default."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(with_machine(sweep, rows) + "\n")
    (folder / "table.csv").write_text(as_csv(rows))
    (folder / "config.yaml").write_text(as_yaml(whole(sweep.config)))
    (folder / "difference.yaml").write_text(as_yaml(difference(sweep.config)))


def as_yaml(settings: dict[str, Any]) -> str:
    """In the order of the settings."""
    return str(needed("yaml").safe_dump(settings, sort_keys=False))
