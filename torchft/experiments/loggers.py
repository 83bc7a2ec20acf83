"""Where the figures of a run go: CSV files, Weights & Biases, TensorBoard, or your own object.

A logger gets rows of plain numbers, each of a kind:

    train         step, examples_trained, train_loss, train_perplexity, lr, bytes_per_node
    validation    step, examples_trained, local_loss, local_perplexity,
                  global_loss, global_perplexity
    correlation   step, examples_trained, nodes, correlation, variance

`train_loss` and `local_loss` are means over the nodes that trained. `bytes_per_node` is what a node
has sent since the start, as a mean over all nodes.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from torchft.arguments import check_choice
from torchft.errors import SettingsError
from torchft.records import LineWriter

__all__ = [
    "Axis",
    "CSVLogger",
    "Kind",
    "Logger",
    "LoggerChoice",
    "LoggerName",
    "Row",
    "TensorBoardLogger",
    "WandbLogger",
    "check_loggers",
    "chosen",
    "perplexity",
    "writes_files",
]

Row = dict[str, Any]
Kind = Literal["train", "validation", "correlation"]
Axis = Literal["step", "examples"]

_COLUMN = {"step": "step", "examples": "examples_trained"}


class Logger(Protocol):
    """Anything with these three; `Trainer.fit(logger=…)` takes it."""

    def start(self, config: Mapping[str, Any], past: Sequence[tuple[Kind, Row]]) -> None:
        """A run begins, with these settings. One that resumes has a past: the rows so far."""
        ...

    def log(self, kind: Kind, row: Row) -> None:
        """Write one row of figures of this kind."""
        ...

    def close(self) -> None:
        """The run is over, or was given up."""
        ...


def perplexity(loss: float) -> float:
    """e to the loss; infinite where a float ends."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class CSVLogger:
    """`<folder>/train.csv`, `validation.csv`, `correlation.csv` and `config.json`.

    Each line is written when it happens. A run that resumes writes its past again, so that the
    files are those of a run that was never interrupted.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[Kind, LineWriter] = {}

    def start(self, config: Mapping[str, Any], past: Sequence[tuple[Kind, Row]]) -> None:
        """Make the folder; files of an earlier run of this name are replaced."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kinds: tuple[Kind, ...] = ("train", "validation", "correlation")
        for kind in kinds:
            (self.folder / f"{kind}.csv").unlink(missing_ok=True)
        text = json.dumps(config, indent=2) + "\n"
        (self.folder / "config.json").write_text(text)
        for kind, row in past:
            self.log(kind, row)

    def log(self, kind: Kind, row: Row) -> None:
        """One line; the first of a kind makes the file, with the names above it."""
        file = self._files.get(kind)
        if file is None:
            file = LineWriter(self.folder / f"{kind}.csv")
            file.write(_csv(row))
            self._files[kind] = file
        file.write(_csv(row.values()))

    def close(self) -> None:
        """Close the files of all kinds of rows."""
        while self._files:
            self._files.popitem()[1].close()


def _csv(values: Iterable[Any]) -> bytes:
    text = StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue().encode()


class WandbLogger:
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it on this machine.

    Raises:
        SettingsError: the package `wandb` is not installed.
    """

    def __init__(
        self, project: str, name: str, *, axis: Axis = "step", folder: str | Path | None = None
    ) -> None:
        self._wandb = _imported("wandb", "wandb", "W&B")
        self._project, self._name, self._axis, self._folder = project, name, axis, folder
        self._run: Any = None

    def start(self, config: Mapping[str, Any], past: Sequence[tuple[Kind, Row]]) -> None:
        """Start the run. The past of one that resumes is in the run that was interrupted."""
        self._run = self._wandb.init(
            project=self._project, name=self._name, config=dict(config), dir=self._folder
        )
        self._run.define_metric("*", step_metric=_COLUMN[self._axis])

    def log(self, kind: Kind, row: Row) -> None:
        """The row under its own names."""
        self._run.log({name: value for name, value in row.items() if value is not None})

    def close(self) -> None:
        """Finish the run at Weights & Biases."""
        if self._run is not None:
            self._run.finish()
            self._run = None


class TensorBoardLogger:
    """Event files for TensorBoard, in `folder`.

    Raises:
        SettingsError: the package `tensorboard` is not installed.
    """

    def __init__(self, folder: str | Path, *, axis: Axis = "step") -> None:
        _imported("tensorboard", "tensorboard", "TensorBoard")
        self.folder = Path(folder)
        self._column = _COLUMN[axis]
        self._writer: Any = None

    def start(self, config: Mapping[str, Any], past: Sequence[tuple[Kind, Row]]) -> None:
        """Open the files; what an interrupted run wrote beyond its checkpoint is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge = past[-1][1][self._column] + 1 if past else None
        self._writer = SummaryWriter(str(self.folder), purge_step=purge)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")

    def log(self, kind: Kind, row: Row) -> None:
        """One scalar per number, under the row's kind."""
        for name, value in row.items():
            if value is not None and name not in _COLUMN.values():
                self._writer.add_scalar(f"{kind}/{name}", value, row[self._column])

    def close(self) -> None:
        """Write the events that are left, and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


LoggerName = Literal["csv", "tensorboard", "none"]
LoggerChoice = LoggerName | Logger | Sequence[LoggerName | Logger] | None

_NAMES = ("csv", "tensorboard", "none")


def check_loggers(logger: LoggerChoice, axis: Axis) -> None:
    """Refuse what `chosen` cannot make loggers of.

    Raises:
        SettingsError: no such logger or axis.
    """
    check_choice("log_x_axis", axis, _COLUMN)
    asked = _listed(logger)
    for one in asked:
        named = isinstance(one, str) and one in _NAMES
        if not named and (isinstance(one, type) or not _logs(one)):
            raise SettingsError(
                f"logger={one!r}: use {', '.join(_NAMES)}, or an object of your own with start, "
                "log and close"
            )
    names = [one for one in asked if isinstance(one, str)]
    if len(set(names)) < len(names) or ("none" in names and len(asked) > 1):
        raise SettingsError(f"logger={logger!r}: name each once, and 'none' alone")


def _logs(one: object) -> bool:
    return all(callable(getattr(one, name, None)) for name in ("start", "log", "close"))


def _listed(logger: LoggerChoice) -> list[LoggerName | Logger]:
    if logger is None:
        return []
    return list(logger) if isinstance(logger, list | tuple) else [cast("Logger", logger)]


def writes_files(logger: LoggerChoice, wandb_project: str | None) -> bool:
    """Whether a logger that `chosen` makes has files in the run's folder."""
    asked = _listed(logger)
    if logger is None:
        return wandb_project is None
    return "csv" in asked or "tensorboard" in asked


def chosen(
    logger: LoggerChoice, wandb_project: str | None, folder: Path, *, axis: Axis = "step"
) -> list[Logger]:
    """The loggers of a run whose folder, and so whose name, is `folder`. By default CSV, or W&B
    where a project is given; both where both are asked for.

    Raises:
        SettingsError: no such logger or axis, or its package is not installed.
    """
    check_loggers(logger, axis)
    wandb: list[Logger] = []
    if wandb_project is not None:
        wandb.append(WandbLogger(wandb_project, folder.name, axis=axis))
    if logger is None:
        return wandb or [CSVLogger(folder)]
    made = (_made(one, folder, axis) for one in _listed(logger) if one != "none")
    return [*wandb, *made]


def _made(one: LoggerName | Logger, folder: Path, axis: Axis) -> Logger:
    if one == "csv":
        return CSVLogger(folder)
    if one == "tensorboard":
        return TensorBoardLogger(folder, axis=axis)
    return cast("Logger", one)


def _imported(module: str, extra: str, name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"the {name} logger needs the package {module}, which is not installed: install the "
            f"extra {extra!r} (pip install '.[{extra}]' in a checkout), or log to CSV"
        ) from error
