"""The Trainer over real processes: the same call, the same bits, the same logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.optimizers import Prodigy
from helpers.small_runs import odd, pairs
from torch import Tensor, nn

from torchft.errors import SettingsError
from torchft.experiments import Trainer
from torchft.simulator import Result
from torchft.simulator.node import NodeError
from torchft.strategies import DiLoCoStrategy, OptimSpec


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


class OfTheField(nn.Module):
    """Takes dicts by keyword, updates a teacher, and keeps what its last forward pass computed."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(3, 5), nn.Linear(3, 5).requires_grad_(False)
        self.last: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.student.weight, 0.1)
        self.last = (self.student(x) - self.teacher(x) - y).pow(2).mean()
        return {"loss": self.last}


def shares(rank: int, num_nodes: int, train_dataset: bool) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(rank + 10 * train_dataset)
    return {
        "x": torch.randn(20, 3, generator=draws) * (1 + rank),
        "y": torch.randn(20, 5, generator=draws),
    }


def of_the_field(data: Any = shares, *, processes: bool, trainer: Trainer | None = None) -> Result:
    trainer = trainer or Trainer(OfTheField, data, shares, device="cpu")
    trainer.fit(
        strategy=DiLoCoStrategy(
            OptimSpec(Prodigy), OptimSpec(torch.optim.Adafactor, lr=0.1), H=2, max_norm=1.0
        ),
        num_nodes=2,
        max_steps=5,
        batch_size=4,
        deterministic=True,
        digests=True,
        disable_logging=True,
        processes=processes,
    )
    assert trainer.result is not None
    return trainer.result


def test_an_optimizer_and_a_model_of_the_field_compute_the_bits_of_real_processes() -> None:
    real, simulated = of_the_field(processes=True), of_the_field(processes=False)
    assert len(real.digests) == 2 and real.digests == simulated.digests
    for one, other in zip(real.models, simulated.models, strict=True):
        for name, value in other.state_dict().items():
            assert torch.equal(one.state_dict()[name], value), name
    assert real.validations == simulated.validations


class Fails:
    """One of its samples cannot be read."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        if at == 19:
            raise KeyError("image")
        return {"x": torch.ones(3), "y": torch.ones(5)}


def test_a_real_node_says_where_its_data_failed() -> None:
    with pytest.raises(NodeError, match=r"^the data set failed at the batch of node \d in step \d"):
        of_the_field(lambda *of: Fails(), processes=True)


def test_a_run_of_processes_that_is_through_is_kept_whatever_becomes_of_its_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*of: Any) -> None:
        raise ValueError("no mean")

    monkeypatch.setattr("torchft.experiments.real_node.mean_model", fails)
    trainer = Trainer(OfTheField, shares, shares, device="cpu")
    with pytest.raises(ValueError, match="no mean"):
        of_the_field(processes=True, trainer=trainer)
    assert trainer.result is not None and trainer.result.model is None
    assert len(trainer.result.history) == 5 and len(trainer.result.rounds) == 2
    assert len(trainer.result.models) == 2


class Thaws(OfTheField):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.teacher.requires_grad_(self.training)
        return super().forward(x, y)


def test_a_real_node_says_what_was_thawed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "OfTheField", Thaws)
    with pytest.raises(SettingsError, match=r"teacher.weight was unfrozen .* in step 1 of node \d"):
        of_the_field(processes=True)
