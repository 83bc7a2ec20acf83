"""A disk that is full: what is written beside a run is lost, the run is not."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.coordination import lighthouse
from helpers.small_runs import odd, pairs
from torch.distributed import TCPStore

from torchft.best_effort import BestEffort
from torchft.errors import SettingsError
from torchft.experiments.loggers import CSVLogger
from torchft.experiments.progress import ProgressBar
from torchft.experiments.trainer import Trainer
from torchft.manager import Manager
from torchft.process_group import ProcessGroupDummy
from torchft.records import StepRecordsReader, read_step_records
from torchft.strategies import SimpleReduceStrategy

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: a write is cut there, then refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def a_manager() -> Iterator[Manager]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with lighthouse() as server:
        manager = Manager(
            ProcessGroupDummy(0, 1),
            None,
            None,
            1,
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=store.port,
            lighthouse_addr=server.address(),
            hostname="127.0.0.1",
            timeout=timedelta(seconds=10),
        )
        try:
            yield manager
        finally:
            manager.shutdown()


def step(manager: Manager) -> bool:
    manager.start_quorum()
    manager.allreduce(torch.ones(1)).wait()
    return manager.should_commit()


def test_a_failure_is_said_once_and_so_is_its_end() -> None:
    said: list[str] = []
    write = BestEffort("the record", lambda line, *values: said.append(line % values))
    failing = True

    def one() -> None:
        if failing:
            raise OSError(28, "No space left on device")

    assert [write(one) for _ in range(3)] == [False] * 3
    failing = False
    assert write(one) and write(one)
    assert said == [
        "the record is not written, and the run goes on: [Errno 28] No space left on device",
        "the record is written again; lost meanwhile: 3",
    ]


def test_what_is_no_error_of_the_system_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        BestEffort("the record", print)(lambda: 1 / 0)


def test_a_trainer_whose_step_records_meet_a_full_disk_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHFT_STEP_RECORDS", str(FULL))
    with a_manager() as manager:
        assert [step(manager) for _ in range(3)] == [True] * 3
        assert manager.current_step() == 3
    full = [line for line in caplog.messages if "No space left" in line]
    assert len(full) == 1 and "TORCHFT_STEP_RECORDS" in full[0]


def test_records_go_on_after_a_line_that_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "steps.jsonl"
    monkeypatch.setenv("TORCHFT_STEP_RECORDS", str(path))
    with a_manager() as manager:
        assert step(manager)
        with files_end_at(path.stat().st_size + 40):
            assert step(manager) and step(manager)
        assert step(manager)
    reader = StepRecordsReader(path)
    assert ([r.step for r in reader.poll()], reader.torn) == ([0, 3], 1)
    assert [r.step for r in read_step_records(path)] == [0, 3]


def test_a_restarted_trainer_starts_on_a_disk_without_room_for_its_records(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("TORCHFT_STEP_RECORDS", "anywhere")
    monkeypatch.setattr("torchft.manager.telemetry.StepRecords", refused)
    with a_manager() as manager:
        assert step(manager)
    assert any("No space left" in line for line in caplog.messages)


def test_a_note_that_json_cannot_hold_is_named_before_the_vote() -> None:
    with a_manager() as manager:
        manager.start_quorum()
        with pytest.raises(SettingsError, match=r"note loss=tensor.* cannot be recorded"):
            manager.note(loss=torch.ones(1))
        assert manager.should_commit()


def test_a_simulation_whose_figures_meet_a_full_disk_ends_as_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fit(folder: Path) -> Any:
        torch.manual_seed(0)
        trainer = Trainer(odd(), pairs(), device="cpu")
        return trainer.fit(
            strategy=SimpleReduceStrategy(),
            num_nodes=2,
            max_steps=6,
            batch_size=4,
            logger=CSVLogger(folder),
        )

    whole = fit(tmp_path / "whole")
    with files_end_at(300):
        cut = fit(tmp_path / "cut")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, cut.state_dict()[name])
    assert (tmp_path / "cut" / "train.csv").stat().st_size <= 300
    assert "what CSVLogger logs is not written" in caplog.messages[-1]


def test_a_folder_of_figures_that_cannot_be_made_is_an_error_of_the_start() -> None:
    trainer = Trainer(odd(), pairs(), device="cpu")
    with pytest.raises(NotADirectoryError):
        trainer.fit(
            strategy=SimpleReduceStrategy(),
            num_nodes=2,
            max_steps=2,
            batch_size=4,
            logger=CSVLogger("/dev/null/figures"),
        )


def test_a_bar_on_a_full_disk_does_not_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    with FULL.open("w") as stream:
        progress = ProgressBar("run", 2, stream=stream)
        progress.step(1.0)
        progress.say()
        progress.step(0.5)
        progress.close()
        assert "No space left" in caplog.text
        stream.buffer.raw.close()  # type: ignore[attr-defined]  # nothing is left to be flushed


def test_logging_to_a_full_disk_does_not_end_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handler = logging.FileHandler(FULL)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=lambda _: None, flush=lambda: None))
    logger = logging.getLogger("torchft.manager")
    logger.addHandler(handler)
    try:
        with a_manager() as manager:
            manager.start_quorum()
            manager.report_error(RuntimeError("a warning is written"))
            assert not manager.should_commit()
    finally:
        logger.removeHandler(handler)
        handler.stream = None  # type: ignore[assignment]
