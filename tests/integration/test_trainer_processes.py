"""The Trainer over real processes: the same call, the same bits, the same logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import odd, pairs

from torchft.simulator import Result, Trainer
from torchft.strategies import DiLoCoStrategy


def fit(folder: Path, **settings: Any) -> Result:
    trainer = Trainer(odd(), pairs(), pairs(20), device="cpu")
    model = trainer.fit(
        strategy=DiLoCoStrategy(H=3),
        num_nodes=2,
        max_steps=7,
        batch_size=4,
        val_size=10,
        run_name="run",
        log_dir=folder,
        deterministic=True,
        **settings,
    )
    assert trainer.result is not None and trainer.result.model is model
    return trainer.result


def test_real_processes_give_the_result_of_the_simulation(tmp_path: Path) -> None:
    real = fit(tmp_path / "real", processes=True)
    simulated = fit(tmp_path / "simulated")
    assert [row.losses for row in real.history] == [row.losses for row in simulated.history]
    assert real.bytes_sent == simulated.bytes_sent
    for one, other in zip(real.models, simulated.models, strict=True):
        for name, value in other.state_dict().items():
            assert torch.equal(one.state_dict()[name], value), name
    assert real.validations == simulated.validations
    logs = [tmp_path / which / "run" for which in ("real", "simulated")]
    for name in ("train.csv", "validation.csv"):
        assert len({(log / name).read_text() for log in logs}) == 1


def test_what_looks_into_nodes_between_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="correlation_interval"):
        fit(tmp_path, processes=True, correlation_interval=2)
