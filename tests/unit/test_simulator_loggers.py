"""Loggers: what is in the files, after a whole run and after one that resumed. Real packages."""

from __future__ import annotations

import csv
import json
import math
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from torchft.errors import SettingsError
from torchft.experiments.loggers import (
    CSVLogger,
    Kind,
    Row,
    TensorBoardLogger,
    WandbLogger,
    check_loggers,
    chosen,
    perplexity,
)
from torchft.experiments.progress import ProgressBar

PAST: list[tuple[Kind, Row]] = [
    ("validation", {"step": 0, "examples_trained": 0, "local_loss": 3.0}),
    ("train", {"step": 1, "examples_trained": 8, "train_loss": 2.0}),
    ("train", {"step": 2, "examples_trained": 16, "train_loss": 1.0}),
]
MORE: Row = {"step": 3, "examples_trained": 24, "train_loss": 0.5}


def _read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_each_kind_of_row_has_its_csv_with_names_above(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "run")
    logger.start({"num_nodes": 2}, [])
    for kind, row in PAST:
        logger.log(kind, row)
    logger.close()
    assert _read(tmp_path / "run" / "train.csv") == [
        ["step", "examples_trained", "train_loss"],
        ["1", "8", "2.0"],
        ["2", "16", "1.0"],
    ]
    assert _read(tmp_path / "run" / "validation.csv")[1] == ["0", "0", "3.0"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"num_nodes": 2}
    assert not (tmp_path / "run" / "correlation.csv").exists()


def test_lines_end_as_other_programs_expect(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.start({}, [])
    logger.log("train", MORE)
    logger.close()
    text = (tmp_path / "train.csv").read_bytes()
    assert text == b"step,examples_trained,train_loss\n3,24,0.5\n"


def test_lines_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.start({}, [])
    logger.log("train", MORE)
    assert len(_read(tmp_path / "train.csv")) == 2
    logger.close()


def test_a_resumed_run_leaves_the_files_of_one_that_was_never_interrupted(tmp_path: Path) -> None:
    interrupted, whole = CSVLogger(tmp_path / "a"), CSVLogger(tmp_path / "b")
    for logger in (interrupted, whole):
        logger.start({}, [])
        for kind, row in PAST:
            logger.log(kind, row)
    interrupted.log("train", {**MORE, "train_loss": 99.0})  # beyond the checkpoint: done again
    interrupted.close()
    interrupted.start({}, PAST)
    for logger in (interrupted, whole):
        logger.log("train", MORE)
        logger.close()
    files = ("train.csv", "validation.csv", "config.json")
    assert [(tmp_path / "a" / name).read_bytes() for name in files] == [
        (tmp_path / "b" / name).read_bytes() for name in files
    ]


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_a_curve_per_figure(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, axis="examples")
    logger.start({"num_nodes": 2}, [])
    for kind, row in PAST:
        logger.log(kind, row)
    logger.close()
    assert _scalars(tmp_path, "train/train_loss") == [(8, 2.0), (16, 1.0)]
    assert _scalars(tmp_path, "validation/local_loss") == [(0, 3.0)]


def test_tensorboard_hides_what_an_interrupted_run_wrote_beyond_its_checkpoint(
    tmp_path: Path,
) -> None:
    for past, rows in (
        ([], [*PAST, ("train", {**MORE, "train_loss": 99.0})]),
        (PAST, [("train", MORE)]),
    ):
        logger = TensorBoardLogger(tmp_path)
        logger.start({}, past)
        for kind, row in rows:
            logger.log(kind, row)
        logger.close()
    assert _scalars(tmp_path, "train/train_loss") == [(1, 2.0), (2, 1.0), (3, 0.5)]


@pytest.mark.parametrize(("module", "extra"), [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_package_is_an_error_that_names_the_extra(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingsError, match=f"extra '{extra}'"):
        WandbLogger("p", "n") if module == "wandb" else TensorBoardLogger(tmp_path)


def test_the_perplexity_of_a_huge_loss_is_infinite() -> None:
    assert perplexity(1e4) == math.inf
    assert perplexity(0.0) == 1.0


class _Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_line_each_ten_seconds_and_at_the_end() -> None:
    stream, times = StringIO(), iter([10.0, 12.0, 20.0, 20.0, 29.9, 30.0, 30.0, 31.0, 35.0])
    progress = ProgressBar("run", 7, 2, stream=stream, clock=lambda: next(times))
    lines = []
    for loss in (0.5, 0.25, 0.125, 0.0625):
        progress.step(loss)
        progress.now_and_then()
        lines.append(stream.getvalue().count("\n"))
    assert lines == [0, 1, 1, 2]
    assert stream.getvalue().startswith("run: 4 of 7 steps, 0.2 it/s, loss 0.25\n")
    progress.step(0.03)
    progress.now_and_then()
    progress.show(validation=0.75)
    progress.say()  # the line at the end says so too
    progress.close()
    assert stream.getvalue().splitlines()[2:] == [
        "run: 7 steps, 0.2 it/s, loss 0.03, validation 0.75"
    ]


def test_without_a_terminal_a_validation_has_its_line() -> None:
    stream, times = StringIO(), iter([0.0, 2.0, 4.0])
    progress = ProgressBar("run", 2, stream=stream, clock=lambda: next(times))
    progress.step(0.5)
    progress.show(validation=0.75)
    progress.say()
    assert stream.getvalue() == "run: 1 of 2 steps, 0.5 it/s, loss 0.5, validation 0.75\n"


def test_a_run_that_stopped_early_says_so() -> None:
    stream, times = StringIO(), iter([0.0, 1.0])
    progress = ProgressBar("run", 6, stream=stream, clock=lambda: next(times))
    progress.step(1.0)
    progress.close()
    assert stream.getvalue() == "run: 1 of 6 steps, 1.0 it/s, loss 1\n"


def test_a_terminal_gets_a_bar_with_the_loss() -> None:
    stream = _Terminal()
    progress = ProgressBar("run", 2, stream=stream)
    for loss in (0.5, 0.25):
        progress.step(loss)
    progress.close()
    last: Any = stream.getvalue().replace("\r", "\n").strip().splitlines()[-1]
    assert "run: 100%" in last and "2/2" in last and "loss=0.25" in last and "it/s" in last


# --- what is chosen


def test_several_loggers_may_be_named(tmp_path: Path) -> None:
    own = CSVLogger(tmp_path / "own")
    found = chosen(["csv", "tensorboard", own], None, tmp_path)
    assert [type(one) for one in found] == [CSVLogger, TensorBoardLogger, CSVLogger]
    assert found[2] is own
    assert chosen("none", None, tmp_path) == chosen(["none"], None, tmp_path) == []


@pytest.mark.parametrize("logger", [3, ["csv", 3], CSVLogger, True, "stdout", ["stdout"], {}])
def test_what_is_no_logger_is_refused_with_those_there_are(logger: Any) -> None:
    with pytest.raises(SettingsError, match=r"logger=.*csv, tensorboard, none, or an object"):
        check_loggers(logger, "step")


@pytest.mark.parametrize("logger", [["csv", "csv"], ["none", "csv"]])
def test_names_that_do_not_go_together_are_refused(logger: Any) -> None:
    with pytest.raises(SettingsError, match="name each once, and 'none' alone"):
        check_loggers(logger, "step")
