"""Subclasses of DilocoSimulator in the shapes that people publish: their methods are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.small_runs import pairs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from torchft.compat.diloco_sim import DilocoSimulator, DilocoSimulatorConfig, EvalStats, TrainStats
from torchft.errors import SettingsError
from torchft.experiments import local_nodes
from torchft.simulator import Result


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a script, which has no threads yet."""
    monkeypatch.setattr(local_nodes, "_can_fork", lambda: True)
    monkeypatch.chdir(tmp_path)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


OPTIONS: dict[str, Any] = {
    "model_cls": Net,
    "train_dataset": pairs(80),
    "loss_fn": cross_entropy,
    "num_nodes": 2,
    "diloco_interval": 3,
    "batch_size": 4,
    "max_local_step": 7,
    "device": "cpu",
}


def train(cls: type[DilocoSimulator], **options: Any) -> Result:
    return cls(**{**OPTIONS, **options}).train()


def assert_alike(one: Result, other: Result) -> None:
    for mine, theirs in zip(one.models, other.models, strict=True):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-5, atol=1e-6)


class Same(DilocoSimulator):
    """It says what the base class does, and returns nothing, as many do."""

    def _train_step(self) -> None:
        x, y = self._get_batch()
        self.optimizer.zero_grad()
        loss = self.config.loss_fn(self.model(x), y)
        loss.backward()
        self.optimizer.step()


def test_a_train_step_of_ones_own_is_called_and_the_rest_stays_as_it_was() -> None:
    own, plain = train(Same), train(DilocoSimulator)
    assert_alike(own, plain)
    for mine, theirs in zip(own.history, plain.history, strict=True):
        assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert [record.step for record in own.rounds] == [2, 5]
    # Rank 0 sends what it averages and then what all take over; the row world needs no second.
    assert own.bytes_sent == [2 * (24 + 24) * 4, 2 * 24 * 4]


class Sign(Same):
    """Steps by the sign, so that nothing else can have made the weights."""

    def _train_step(self) -> None:
        x, y = self._get_batch()
        self.optimizer.zero_grad()
        self.config.loss_fn(self.model(x), y).backward()
        for parameter in self.model.parameters():
            parameter.data -= 0.125 * parameter.grad.sign()


class Half(DilocoSimulator):
    """Only the bias is averaged."""

    def _average_models(self) -> None:
        bias = self.model.layer.bias.data
        dist.all_reduce(bias)
        bias /= self.config.num_nodes

    def _outer_step(self) -> None:
        self._average_models()


@pytest.mark.filterwarnings("ignore:.*opened no round:UserWarning")
@pytest.mark.parametrize("interval", [3, 100])
def test_the_weights_are_what_the_own_methods_made_them(interval: int) -> None:
    signs = train(Sign, diloco_interval=100, max_local_step=3)
    start = DilocoSimulator(**OPTIONS)._build_model().state_dict()
    for model in signs.models:
        moved = (model.state_dict()["layer.weight"] - start["layer.weight"]) / 0.125
        torch.testing.assert_close(moved, moved.round(), atol=1e-5, rtol=0)
    half = train(Half, diloco_interval=interval, max_local_step=3)
    one, other = (model.state_dict() for model in half.models)
    assert torch.equal(one["layer.bias"], other["layer.bias"]) == (interval == 3)
    assert not torch.equal(one["layer.weight"], other["layer.weight"])


class Counting(DilocoSimulator):
    """An evaluation that is known: the sum of the weights."""

    def _eval_model(self) -> float:
        self.model.eval()
        x, _ = self._get_batch(eval=True)
        assert x.shape == (4, 7)
        return float(self.model.layer.weight.detach().sum())


def test_an_evaluation_of_ones_own_gives_the_figures_and_the_hook_gets_them() -> None:
    seen: list[EvalStats] = []
    own = train(Counting, eval_dataset=pairs(20), eval_interval=3, eval_loss_hook=seen.append)
    sums = [float(model.state_dict()["layer.weight"].sum()) for model in own.models]
    last = own.validations[-1]
    assert [look["step"] for look in own.validations] == [0, 3, 6, 7]
    assert list(last["local_losses"].values()) == pytest.approx(sums, abs=1e-5)
    assert last["global_loss"] == pytest.approx(sum(sums) / 2, abs=1e-5)
    assert [stats.glob for stats in seen] == [False, True] * 4
    assert own.bytes_sent[1] == 2 * 24 * 4  # looking is not counted


@pytest.mark.filterwarnings("ignore:.*opened no round:UserWarning")
def test_a_method_that_is_put_on_the_class_from_outside_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def constant(simulator: DilocoSimulator) -> float:
        return 0.25 + simulator.rank

    monkeypatch.setattr(DilocoSimulator, "_eval_model", constant)
    result = train(DilocoSimulator, eval_dataset=pairs(20), max_local_step=1)
    assert [look["local_losses"] for look in result.validations] == [{0: 0.25, 1: 1.25}] * 2


@pytest.mark.filterwarnings("ignore:.*opened no round:UserWarning")
def test_it_is_called_without_held_out_samples_too_and_spends_none_of_the_others() -> None:
    own = train(Counting, max_local_step=2)
    assert [look["step"] for look in own.validations] == [0, 2]
    plain = train(DilocoSimulator, max_local_step=2)
    assert own.history[1].loss == pytest.approx(plain.history[1].loss, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*opened no round:UserWarning")
def test_a_method_that_is_put_on_the_object_is_called() -> None:
    simulator = DilocoSimulator(**{**OPTIONS, "max_local_step": 2})
    simulator._train_step = lambda: 0.5  # type: ignore[method-assign]
    assert [row.loss for row in simulator.train().history] == [0.5, 0.5]


class Whole(Same):
    """Its own process around the loop, its own master, its own checkpoint."""

    def _train(self, rank: int) -> None:
        Path(f"began_{rank}").touch()
        super()._train(rank)

    def _log_train(self, train_stats: TrainStats) -> None:
        with Path("losses").open("a") as file:
            print(self.rank, self.local_step, train_stats.loss, file=file)

    def _setup_master_model(self) -> None:
        if self.rank == 0:
            self.master_model = type(self.model)(**self.config.model_kwargs)
            self.master_model.load_state_dict(self.model.state_dict())


def test_set_up_and_checkpoints_of_a_config(tmp_path: Path) -> None:
    fields = {**OPTIONS, "ckpt_interval": 1, "save_dir": tmp_path, "p_sparta": 0.3}
    simulator = Whole(DilocoSimulatorConfig(**fields, cosine_anneal=True, warmup_steps=2))
    result = simulator.train()
    assert Path("began_0").exists() and Path("began_1").exists()
    assert {path.name for path in tmp_path.glob("*.pt")} == {"model_3.pt", "model_6.pt", "model.pt"}
    lines = [line.split() for line in Path("losses").read_text().splitlines()]
    assert [line[:2] for line in lines] == [["0", str(step + 1)] for step in range(7)]
    assert float(lines[-1][2]) == result.history[-1].losses[0]
    assert result.history[0].lr == pytest.approx(5e-4)
    assert simulator.model is result.model and isinstance(simulator.model, Net)


def test_a_method_that_nothing_would_call_is_refused() -> None:
    class Loading(DilocoSimulator):
        def _setup_train_dataloader(self) -> None:
            """Never called."""

    with pytest.raises(SettingsError, match=r"Loading has _setup_train_dataloader .* _get_batch"):
        train(Loading)
