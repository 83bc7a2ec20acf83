"""Weights & Biases, offline: the real package, which starts a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb
from helpers.small_runs import fit, pairs
from torch import nn
from torch.nn.functional import cross_entropy

from torchft.experiments import DilocoSimulator
from torchft.experiments.loggers import WandbLogger


@pytest.fixture(autouse=True)
def _offline_in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it remembers the folder that an earlier run of this process was in


def runs(folder: Path = Path()) -> list[Path]:
    return list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_every_row_is_kept(tmp_path: Path) -> None:
    logger = WandbLogger("project", "name", axis="examples", folder=tmp_path)
    logger.start({"num_nodes": 2}, [])
    logger.log("validation", {"step": 0, "examples_trained": 0, "local_loss": 3.0})
    logger.log("train", {"step": 1, "examples_trained": 8, "train_loss": 2.0})
    logger.log("train", {"step": 2, "examples_trained": 16, "train_loss": 1.0})
    summary = dict(logger._run.summary)
    config = dict(logger._run.config)
    logger.close()
    assert (summary["train_loss"], summary["local_loss"], summary["step"]) == (1.0, 3.0, 2)
    assert config == {"num_nodes": 2}
    assert runs(tmp_path)


def test_it_gets_a_trainers_run() -> None:
    fit(wandb_project="project", val=pairs(20), correlation_interval=3)
    assert runs()
    assert not Path("logs").exists()


class Net(nn.Linear):
    def __init__(self) -> None:
        super().__init__(7, 3)


def test_it_gets_a_simulators_run_under_its_name() -> None:
    simulator = DilocoSimulator(
        model_cls=Net,
        train_dataset=pairs(128),
        loss_fn=cross_entropy,
        num_nodes=2,
        diloco_interval=4,
        batch_size=4,
        device="cpu",
        wandb_project="project",
        wandb_name="name",
        max_local_step=2,
    )
    simulator.train()
    assert runs()
