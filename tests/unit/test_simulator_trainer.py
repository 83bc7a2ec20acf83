"""The Trainer: EXO Gym's calls keep working, settings mean what they say, bad ones are refused."""

from __future__ import annotations

import csv
import inspect
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import Odd, bits, fit, odd, pairs
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchft.errors import SettingsError
from torchft.experiments import Trainer, processes
from torchft.experiments.models import Mlp
from torchft.simulator import NodeError, TrainNode
from torchft.strategies import (
    DiLoCoStrategy,
    LocalSGDStrategy,
    OptimSpec,
    SimpleReduceStrategy,
    StreamingDiLoCoStrategy,
)

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def read(name: str) -> list[dict[str, str]]:
    with open(f"logs/run/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- the manner of EXO Gym


def test_a_script_of_exo_gym_runs_and_gets_its_model() -> None:
    trainer = Trainer(odd(), pairs(), pairs(20), device="cpu")
    model = trainer.fit(1, DiLoCoStrategy(OptimSpec(torch.optim.AdamW, lr=1e-3), H=4), 2)
    assert isinstance(model, Odd)
    assert model.eval()(pairs()[:5]).dim() == 0
    odd().load_state_dict(model.state_dict())


def test_the_order_of_arguments_is_exo_gyms() -> None:
    names = list(inspect.signature(Trainer.fit).parameters)
    assert names[1:15] == [
        "num_epochs", "strategy", "num_nodes", "max_steps", "batch_size", "minibatch_size",
        "shuffle", "val_size", "val_interval", "autocast", "checkpoint_interval",
        "correlation_interval", "save_dir", "dataloader_kwargs",
    ]  # fmt: skip
    names = list(inspect.signature(Trainer).parameters)
    assert names[:6] == ["model", "train_dataset", "val_dataset", "start_port", "device", "devices"]


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        fit(learning_rate=3)


def test_a_port_is_accepted_with_the_reason_why_none_is_needed() -> None:
    with pytest.warns(UserWarning, match="start_port=12355 is not needed"):
        Trainer(odd(), pairs(), start_port=12355)


def test_the_model_that_was_given_is_not_touched() -> None:
    model = odd()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = fit(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert trainer.result is not None and trainer.result.model is not model


def test_the_callers_generators_go_on_where_they_were() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(val=pairs(20), checkpoint_interval=2)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_follows_from_its_seed_alone() -> None:
    def run(seed: int) -> str:
        torch.manual_seed(seed * 7)
        result = fit(seed=seed, run_name=None).result
        assert result is not None
        return bits(result)

    assert run(1) == run(1) != run(2)


def test_a_deterministic_run_has_its_bits_whatever_threads_the_caller_has() -> None:
    threads = torch.get_num_threads()
    data = torch.randn(512, 1, 28, 28), torch.randint(0, 10, (512,))
    model = Mlp()

    def run(on: int) -> str:
        torch.set_num_threads(on)
        try:
            settings = {"batch_size": 64, "max_steps": 4, "run_name": f"on {on}"}
            result = fit(model, data, deterministic=True, **settings).result
            assert torch.get_num_threads() == on
        finally:
            torch.set_num_threads(threads)
        assert result is not None
        return bits(result)

    assert run(1) == run(2)


def test_the_mean_model_holds_the_mean_of_the_nodes() -> None:
    result = fit(max_steps=3).result
    assert result is not None and result.model is not None
    one, two = (m.get_parameter("out.weight") for m in result.models)
    assert not torch.equal(one, two)
    torch.testing.assert_close(result.model.get_parameter("out.weight"), (one + two) / 2)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"num_epochs": None, "max_steps": None}, 5),
        ({"num_epochs": 3, "max_steps": None}, 15),
        ({"num_epochs": None, "max_steps": 12}, 12),
        ({"num_epochs": 1, "max_steps": 12}, 5),
        ({"num_epochs": 9, "max_steps": 12}, 12),
    ],
)
def test_a_run_ends_with_its_epochs_or_its_steps(length: dict[str, Any], steps: int) -> None:
    result = fit(**length).result
    assert result is not None and len(result.history) == steps


def test_a_factory_gives_each_node_its_own_data() -> None:
    asked = set()

    def make(rank: int, num_nodes: int, train_dataset: bool) -> Dataset[Any]:
        asked.add((rank, num_nodes, train_dataset))
        return pairs(20 + rank)

    fit(data=make, val=make, val_size=3)
    assert asked == {(0, 2, True), (1, 2, True), (0, 2, False), (1, 2, False)}


def test_batches_may_be_dicts() -> None:
    class Words(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"x": torch.full((7,), index / 40), "y": torch.tensor(index % 3)}

    class FromDict(Odd):
        def forward(self, batch: Any) -> Tensor:
            return super().forward((batch["x"], batch["y"]))

    result = fit(FromDict(), Words(), Words(), minibatch_size=3, val_size=5).result
    assert result is not None and len(result.history) == 6
    assert len(result.validations) == 2


def test_a_node_of_ones_own_says_what_the_loss_is() -> None:
    class Doubled(TrainNode):
        def loss(self, batch: Any) -> Tensor:
            return 2 * self.model(batch)

    plain = fit(max_steps=1)
    doubled = fit(max_steps=1, on={"node_cls": Doubled}, run_name="doubled")
    assert plain.result is not None and doubled.result is not None
    assert doubled.result.final_loss == pytest.approx(2 * plain.result.final_loss)


class Linear(nn.Module):
    """Says which dtype it computed in."""

    seen: torch.dtype

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 3)

    def forward(self, batch: Any) -> Tensor:
        out = self.linear(batch[0])
        Linear.seen = out.dtype
        return nn.functional.cross_entropy(out, batch[1])


@pytest.mark.parametrize("autocast", [True, torch.bfloat16])
def test_autocast_computes_in_bfloat16_and_keeps_the_weights(autocast: Any) -> None:
    model = fit(Linear(), val=pairs(20), autocast=autocast).result
    assert Linear.seen == torch.bfloat16
    assert model is not None and model.models[0].get_parameter("linear.weight").dtype == torch.float
    fit(Linear(), run_name="without")
    assert Linear.seen == torch.float


# --- logs


def test_logs_are_in_a_folder_of_the_runs_name() -> None:
    result = fit(val=pairs(20), val_interval=4, correlation_interval=3).result
    assert result is not None
    train, looks = read("train"), read("validation")
    assert list(train[0]) == [
        "step", "examples_trained", "train_loss", "train_perplexity", "lr", "bytes_per_node",
    ]  # fmt: skip
    assert [int(row["step"]) for row in train] == [1, 2, 3, 4, 5, 6]
    assert [int(row["examples_trained"]) for row in train] == [16, 32, 48, 64, 80, 96]
    assert float(train[-1]["train_loss"]) == result.final_loss
    assert float(train[-1]["train_perplexity"]) == math.exp(result.final_loss)
    assert [float(row["bytes_per_node"]) > 0 for row in train] == [False] * 3 + [True] * 3
    assert float(train[-1]["bytes_per_node"]) == sum(result.bytes_sent) / 2
    assert [int(row["step"]) for row in looks] == [0, 4, 6]
    assert float(looks[1]["global_loss"]) == result.validations[1]["global_loss"]
    assert [int(row["step"]) for row in read("correlation")] == [3, 6]
    assert float(read("correlation")[0]["correlation"]) == result.correlations[0]["correlation"]
    config = json.loads(Path("logs/run/config.json").read_text())
    assert (config["num_nodes"], config["strategy"]["H"], config["seed"]) == (2, 4, 42)


def test_a_name_is_made_of_strategy_and_time_and_never_twice() -> None:
    for _ in range(3):
        fit(run_name=None)
    names = os.listdir("logs")
    assert len(names) == 3 and all(name.startswith("diloco_2") for name in names)


def test_the_logs_of_an_earlier_run_of_the_name_are_not_replaced() -> None:
    fit()
    kept = Path("logs/run/train.csv").read_bytes()
    for logger in ("csv", "tensorboard"):
        with pytest.raises(SettingsError, match=r"logs/run holds the logs .*another.*resume=True"):
            fit(max_steps=3, logger=logger)
    assert Path("logs/run/train.csv").read_bytes() == kept
    fit(logger="none")
    fit(disable_logging=True)


def test_two_runs_that_begin_at_once_have_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path.mkdir

    def other_was_first(folder: Path, *args: Any, **more: Any) -> None:
        if folder.parent.name == "logs" and not folder.parent.exists():
            made(folder, parents=True)  # by another process, after this one has looked
        made(folder, *args, **more)

    monkeypatch.setattr(Path, "mkdir", other_was_first)
    fit(run_name=None)
    first, second = sorted(os.listdir("logs"))
    assert second == f"{first}_2"
    assert os.listdir(f"logs/{first}") == [] and os.listdir(f"logs/{second}") != []


def test_loggers_may_be_named_in_a_list() -> None:
    fit(logger=["csv", "tensorboard"])
    assert len(read("train")) == 6
    assert list(Path("logs/run").glob("events.out.tfevents.*"))


def test_without_logging_nothing_is_written_or_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fit(disable_logging=True, val=pairs(20))
    assert os.listdir() == []
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_the_line_at_the_end_has_losses_and_speed(capsys: pytest.CaptureFixture[str]) -> None:
    fit(val=pairs(20))
    line = capsys.readouterr().err
    assert line.startswith("run: 0 of 6 steps, ") and line.count("\n") == 2
    line = line.splitlines()[1]
    assert line.startswith("run: 6 steps, ")
    assert all(part in line for part in ("it/s", "loss ", "local ", "global "))


def test_tensorboard_gets_the_run() -> None:
    fit(logger="tensorboard", log_x_axis="examples")
    assert list(Path("logs/run").glob("events.out.tfevents.*"))


def test_one_node_trains_and_has_nothing_to_correlate_with() -> None:
    with pytest.warns(UserWarning, match="none to correlate with"):
        result = fit(num_nodes=1, correlation_interval=3, val=pairs(20)).result
    assert result is not None
    assert [found["correlation"] for found in result.correlations] == [None, None]
    assert result.validations[-1]["local_loss"] == result.validations[-1]["global_loss"]
    assert read("correlation")[0]["correlation"] == ""


# --- refused, before anything is written


class Vector(Odd):
    def forward(self, batch: Any) -> Any:
        return self.out(self.into(batch[0]))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no nodes": ({"num_nodes": 0}, "num_nodes=0"),
    "less than no nodes": ({"num_nodes": -1}, "num_nodes=-1"),
    "nodes not given": ({"num_nodes": None}, "num_nodes"),
    "no strategy": ({"strategy": None}, "strategy"),
    "not a strategy": ({"strategy": "diloco"}, "strategy is a str"),
    "no batch": ({"batch_size": 0}, "batch_size=0"),
    "a negative batch": ({"batch_size": -8}, "batch_size=-8"),
    "no minibatch": ({"minibatch_size": 0}, "^minibatch_size=0"),
    "no steps": ({"max_steps": 0}, "max_steps=0"),
    "no epochs": ({"num_epochs": 0}, "num_epochs=0"),
    "a batch above the shard": ({"batch_size": 41}, "batch_size=41 is more than the 40 samples"),
    "fewer samples than nodes": ({"num_nodes": 81, "batch_size": 1}, "80 samples.*81 nodes"),
    "no interval": ({"val_interval": 0}, "val_interval=0"),
    "negative validation": ({"val_size": -1}, "val_size=-1"),
    "no checkpoint interval": ({"checkpoint_interval": 0}, "checkpoint_interval=0"),
    "no correlation interval": ({"correlation_interval": 0}, "correlation_interval=0"),
    "another axis": ({"log_x_axis": "time"}, "log_x_axis='time'"),
    "another axis, though nothing is logged": (
        {"log_x_axis": "time", "disable_logging": True},
        "log_x_axis='time'",
    ),
    "a number as logger": ({"logger": 3, "disable_logging": True}, "logger=3: use csv"),
    "keeping no checkpoint": ({"keep_checkpoints": 0}, "keep_checkpoints=0"),
    "a name with a folder": ({"run_name": "a/b", "disable_logging": True}, "run_name='a/b'"),
    "the folder above": ({"run_name": ".."}, r"run_name='\.\.'.*log_dir and save_dir"),
    "a name of nothing": ({"run_name": ""}, "run_name=''"),
    "a number as name": ({"run_name": 3}, "run_name=3"),
    "a name that is long": ({"run_name": "ü" * 101}, "200 bytes or fewer"),
    "logs in a file": ({"log_dir": "/dev/null/logs"}, "log_dir: .* because /dev/null is none"),
    "logs where none can be": ({"log_dir": "/proc/logs"}, "log_dir: /proc/logs cannot be written"),
    "checkpoints in a file": (
        {"save_dir": "/dev/null", "checkpoint_interval": 5},
        "save_dir: /dev/null cannot be a folder",
    ),
    "a number as folder": (
        {"save_dir": 3, "checkpoint_interval": 5},
        "save_dir=3: it must be a path",
    ),
    "another logger": ({"logger": "stdout"}, "logger='stdout'"),
    "an unknown loader option": ({"dataloader_kwargs": {"batch_size": 3}}, "dataloader_kwargs"),
    "no such device": ({"device": "tpu"}, "tpu"),
    "no loss": ({"model": Vector()}, "return its loss"),
    "a factory without arguments": ({"data": lambda: pairs()}, "rank, num_nodes, train_dataset"),
    "several devices": ({"on": {"device": None, "devices": [0, 1]}}, "processes=True"),
    "devices of a CPU": ({"on": {"device": "cpu", "devices": [0, 1]}}, "numbers of CUDA devices"),
    "checkpoints of processes": ({"processes": True, "checkpoint_interval": 5}, "processes=True"),
    "checkpoints where a round is always in flight": (
        {
            "strategy": StreamingDiLoCoStrategy(H=4, fragments=2, delay=2),
            "checkpoint_interval": 5,
        },
        "DiLoCoRecipe has delay=2, so a round is in flight after every step",
    ),
    "resuming processes": ({"processes": True, "resume": True}, "processes=True"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_refused_before_the_first_step(name: str) -> None:
    settings, message = BAD[name]
    with pytest.raises(SettingsError, match=message):
        fit(**settings)
    assert os.listdir() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
@pytest.mark.parametrize("on", [{"device": "cuda"}, {"device": None, "devices": [0]}])
def test_a_gpu_that_is_not_there_is_refused(on: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="CUDA is not there"):
        fit(on=on)


@pytest.mark.parametrize("every", [0, -3])
def test_a_period_of_nothing_is_refused_when_the_strategy_is_made(every: int) -> None:
    for make in (DiLoCoStrategy, LocalSGDStrategy):
        with pytest.raises(SettingsError, match=f"{every}"):
            make(H=every)


def test_ctrl_c_while_processes_run_does_not_guess_how_far_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(experiment: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "run_processes", pressed)
    with pytest.raises(KeyboardInterrupt):
        fit(processes=True)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "run: stopped; there is no checkpoint to go on from"


def test_a_strategy_serves_one_run() -> None:
    strategy = SimpleReduceStrategy()
    fit(strategy=strategy)
    with pytest.raises(SettingsError, match="SimpleReduceStrategy is in use: make one for each"):
        fit(strategy=strategy)


def test_a_refused_strategy_can_be_used_after_all() -> None:
    strategy = SimpleReduceStrategy()
    with pytest.raises(SettingsError):
        fit(strategy=strategy, batch_size=1000)
    fit(strategy=strategy)


class Explodes(Odd):
    """At the third step of whichever node has the sample that is told."""

    def forward(self, batch: Any) -> Tensor:
        loss = super().forward(batch)
        return loss * math.nan if (batch[0] == 99).any() else loss


def test_a_loss_that_is_not_a_number_names_node_and_step() -> None:
    data = pairs()
    data.tensors[0][17] = 99.0  # unshuffled: node 1, position 8, so its second batch of 8
    with pytest.raises(NodeError, match="loss of node 1 in step 2 is nan"):
        fit(Explodes(), data, shuffle=False)
    assert [row["step"] for row in read("train")] == ["1"]  # closed, and complete up to there
