"""DilocoSimulator: the keywords of diloco-sim, their defaults, and that they mean what they say."""

from __future__ import annotations

import dataclasses
import inspect
import os
import threading
import warnings
from typing import Any

import pytest
import torch
from helpers.small_runs import Interrupt, bits, pairs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from torchft.errors import SettingsError
from torchft.experiments import (
    DilocoSimulator,
    DilocoSimulatorConfig,
    EvalStats,
    TrainStats,
    diloco_simulator,
)
from torchft.simulator import Result

DATA = pairs(128)


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


class Net(nn.Module):
    def __init__(self, hidden: int = 5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, hidden), nn.Tanh(), nn.Linear(hidden, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def simulator(**options: Any) -> DilocoSimulator:
    usual: dict[str, Any] = {
        "model_cls": Net,
        "train_dataset": DATA,
        "loss_fn": cross_entropy,
        "num_nodes": 2,
        "diloco_interval": 4,
        "batch_size": 4,
        "device": "cpu",
    }
    return DilocoSimulator(**{**usual, **options})


def train(**options: Any) -> Result:
    return simulator(**options).train()


def test_the_call_of_the_documentation_runs() -> None:
    made = DilocoSimulator(
        model_cls=Net, model_kwargs={"hidden": 6}, train_dataset=DATA, loss_fn=cross_entropy
    )
    result = made.train()
    assert len(result.history) == 128 // (16 * 4)
    assert isinstance(made.model, Net) and isinstance(result.models[3], Net)
    assert made.model(torch.zeros(2, 7)).shape == (2, 3)


DEFAULTS = {
    "model_kwargs": {},
    "optimizer_kwargs": {"lr": 0.001},
    "num_nodes": 4,
    "diloco_interval": 500,
    "batch_size": 16,
    "eval_dataset": None,
    "optimizer_cls": torch.optim.AdamW,
    "ckpt_interval": None,
    "eval_iters": 50,
    "save_dir": None,
    "outer_optimizer_cls": torch.optim.SGD,
    "outer_optimizer_kwargs": {"lr": 0.7, "nesterov": True, "momentum": 0.9},
    "max_local_step": None,
    "num_epochs": 1,
    "cosine_anneal": False,
    "train_loss_hook": None,
    "eval_loss_hook": None,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_keyword_has_its_documented_default(name: str) -> None:
    made = DilocoSimulator(model_cls=Net, train_dataset=DATA, loss_fn=cross_entropy)
    assert getattr(made.config, name) == DEFAULTS[name]


def test_a_config_has_the_defaults_of_configs() -> None:
    config = DilocoSimulatorConfig(model_cls=Net, train_dataset=DATA, loss_fn=cross_entropy)
    assert (config.eval_iters, config.eval_interval, config.warmup_steps) == (400, 1000, 0)
    assert (config.p_sparta, config.sparta_interval, config.max_norm) == (0.0, 1, None)
    assert DilocoSimulator(config).config is config


def test_defaults_are_not_shared_between_simulators() -> None:
    first, second = simulator(), simulator()
    assert first.config.outer_optimizer_kwargs is not second.config.outer_optimizer_kwargs


@pytest.mark.parametrize("missing", ["model_cls", "train_dataset", "loss_fn"])
def test_what_is_required_is_asked_for(missing: str) -> None:
    options = {"model_cls": Net, "train_dataset": DATA, "loss_fn": cross_entropy}
    del options[missing]
    with pytest.raises(TypeError, match=missing):
        DilocoSimulator(**options)


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="outer_lr"):
        simulator(outer_lr=1.0)


def test_a_config_and_keywords_together_are_an_error() -> None:
    with pytest.raises(TypeError, match="not both: num_nodes"):
        DilocoSimulator(simulator().config, num_nodes=3)


def test_a_dict_is_no_config() -> None:
    with pytest.raises(TypeError, match="dict"):
        DilocoSimulator({"model_cls": Net})  # type: ignore[arg-type]


def test_training_calls_the_hook_with_the_loss_of_every_step() -> None:
    seen: list[TrainStats] = []
    result = train(train_loss_hook=seen.append, max_local_step=5)
    assert [stats.loss for stats in seen] == [row.loss for row in result.history]
    assert seen[0].perplexity == pytest.approx(torch.tensor(seen[0].loss).exp().item())


def test_an_evaluation_calls_the_hook_for_local_and_global() -> None:
    seen: list[EvalStats] = []
    result = train(eval_dataset=pairs(40), eval_loss_hook=seen.append, max_local_step=6)
    # Before the first step, after the outer step at 4, at the end.
    assert [look["step"] for look in result.validations] == [0, 4, 6]
    assert [stats.glob for stats in seen] == [False, True] * 3
    assert seen[2].loss == pytest.approx(seen[3].loss)  # synchronised just now
    assert seen[4].loss != seen[5].loss  # two steps later
    assert [s.loss for s in seen[1::2]] == [look["global_loss"] for look in result.validations]


def test_an_evaluation_is_of_so_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    usual = diloco_simulator.Trainer.fit

    def watched(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        sizes.append(kwargs["val_size"])
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(diloco_simulator.Trainer, "fit", watched)
    train(eval_dataset=DATA, eval_iters=7, max_local_step=1)
    assert sizes == [7 * 4]


def outer_by_hand(outer_lr: float, momentum: float) -> Tensor:
    """The first layer's bias after one round, from where the nodes are without an outer step."""
    result = train(max_local_step=4, diloco_interval=100)
    start = simulator()._build_model().get_parameter("layers.0.bias").detach()
    ends = [model.get_parameter("layers.0.bias").detach() for model in result.models]
    delta = start - torch.stack(ends).mean(0)
    return start - outer_lr * (1 + momentum) * delta


def test_the_outer_optimizer_moves_the_model_by_its_rate_and_momentum() -> None:
    for options, lr, momentum in (
        ({"lr": 0.3}, 0.3, 0.0),
        ({"lr": 0.7, "nesterov": True, "momentum": 0.9}, 0.7, 0.9),
    ):
        result = train(max_local_step=4, outer_optimizer_kwargs=options)
        assert result.model is not None
        moved = result.model.get_parameter("layers.0.bias").detach()
        torch.testing.assert_close(moved, outer_by_hand(lr, momentum))


def test_rounds_are_exactly_so_long_and_the_last_step_may_be_one() -> None:
    result = train(max_local_step=12)
    assert [record.step for record in result.rounds if record.committed] == [3, 7, 11]
    one, two = (dict(model.named_parameters()) for model in result.models)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_steps_that_are_left_over_are_averaged_into_the_model() -> None:
    result = train(max_local_step=6)
    one, two = (m.get_parameter("layers.0.bias") for m in result.models)
    assert not torch.equal(one, two) and result.model is not None
    mean = result.model.get_parameter("layers.0.bias")
    torch.testing.assert_close(mean, (one + two) / 2)


def test_minibatches_average_their_gradients() -> None:
    seen: list[int] = []

    def watched(output: Tensor, y: Tensor) -> Tensor:
        seen.append(len(y))
        return cross_entropy(output, y)

    whole = train(max_local_step=4)
    cut = train(max_local_step=4, max_minibatch_size=3, loss_fn=watched)
    assert seen == [2, 2] * 4 * 2
    assert whole.model is not None and cut.model is not None
    for name, value in whole.model.named_parameters():
        torch.testing.assert_close(cut.model.get_parameter(name), value, rtol=1e-3, atol=1e-5)


def test_the_cosine_falls_to_a_tenth_at_the_end_whatever_ends_the_run() -> None:
    rates = [row.lr for row in train(cosine_anneal=True, warmup_steps=2).history]
    assert len(rates) == 16
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 1e-4 < rates[-1] < 1.3e-4
    assert {row.lr for row in train().history} == {1e-3}


def test_max_norm_clips_each_nodes_gradient() -> None:
    plain = {"optimizer_cls": torch.optim.SGD, "optimizer_kwargs": {"lr": 1.0}}
    start = nn.utils.parameters_to_vector(simulator()._build_model().parameters())
    model = train(max_local_step=1, max_norm=0.01, **plain).models[0]
    moved = nn.utils.parameters_to_vector(model.parameters()) - start
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_sparta_averages_between_outer_steps() -> None:
    alone = train(diloco_interval=100, max_local_step=6, corr_interval=6)
    sparta = train(diloco_interval=100, max_local_step=6, corr_interval=6, p_sparta=0.5)
    seldom = train(
        diloco_interval=100, max_local_step=6, corr_interval=6, p_sparta=0.5, sparta_interval=3
    )
    spread = [result.correlations[0]["variance"] for result in (alone, seldom, sparta)]
    assert spread == sorted(spread, reverse=True) and len(set(spread)) == 3
    assert sum(alone.bytes_sent) == 0 < sum(seldom.bytes_sent) < sum(sparta.bytes_sent)


def test_a_saved_model_can_be_started_from() -> None:
    first = simulator(save_dir="kept")
    first.train()
    assert first.model is not None
    saved = torch.load("kept/model.pt", weights_only=True)
    assert saved.keys() == first.model.state_dict().keys()
    for second in (simulator(model_path="kept/model.pt"), simulator()):
        second.load_model("kept/model.pt")
        start = second._build_model().state_dict()
        assert all(torch.equal(start[name], saved[name]) for name in saved)


def test_a_model_of_another_shape_is_refused_by_name() -> None:
    train(save_dir="kept", max_local_step=1)
    with pytest.raises(SettingsError, match=r"kept/model\.pt(?s:.*)size mismatch"):
        train(model_path="kept/model.pt", model_kwargs={"hidden": 9})
    with pytest.raises(SettingsError, match=r"nowhere\.pt"):
        train(model_path="nowhere.pt")


def test_checkpoints_count_outer_steps_and_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_local_step": 14, "run_name": "run", "ckpt_interval": 1}
    whole = bits(train(**{**options, "ckpt_interval": None}))
    stop = Interrupt(11)
    with monkeypatch.context() as patch:
        patch.setattr(diloco_simulator, "_Hooks", lambda *hooks: stop)
        with pytest.raises(KeyboardInterrupt):
            train(save_dir="kept", **options)
    names = sorted(os.listdir("kept/run"))
    assert names == ["step_00000004.pt", "step_00000008.pt"]
    assert bits(train(save_dir="kept", resume=True, **options)) == whole


def test_nothing_is_written_unless_asked_for() -> None:
    train(eval_dataset=pairs(20), max_local_step=2)
    assert os.listdir() == []


def test_devices_that_are_not_there_are_left_out_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = train(devices=[0, 1], device=None, max_local_step=4)
    about = [one for one in said if "devices" in str(one.message)]
    assert len(about) == 1 and "devices=[0, 1]" in str(about[0].message)
    assert len(result.history) == 4


def test_the_signature_has_the_documented_arguments_and_defaults() -> None:
    parameters = inspect.signature(DilocoSimulator).parameters
    for name, default in DEFAULTS.items():
        assert parameters[name].default == default, name
    for name in ("model_cls", "loss_fn", "train_dataset"):
        assert parameters[name].default is inspect.Parameter.empty
    config = {one.name for one in dataclasses.fields(DilocoSimulatorConfig)}
    assert set(parameters) == config | {"config"}
    assert "num_nodes" in inspect.signature(type("Own", (DilocoSimulator,), {})).parameters


def test_a_port_is_accepted_with_the_reason_why_none_is_needed() -> None:
    with pytest.warns(UserWarning, match="port=12355 is not needed"):
        simulator(port=12355)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no interval": ({"diloco_interval": 0}, "diloco_interval=0"),
    "a negative interval": ({"diloco_interval": -1}, "diloco_interval=-1"),
    "no evaluation": ({"eval_iters": 0}, "eval_iters=0"),
    "no minibatch": ({"max_minibatch_size": 0}, "max_minibatch_size=0"),
    "no step": ({"max_local_step": 0}, "^max_local_step=0: it must be an integer"),
    "half a step": ({"max_local_step": 1.5}, "^max_local_step=1.5"),
    "no checkpoint": ({"ckpt_interval": 0, "save_dir": "kept"}, "ckpt_interval=0"),
    "no folder": ({"ckpt_interval": 2}, "save_dir"),
    "a delay": ({"async_sparta_delay": 1}, "async_sparta_delay=1"),
    "no nodes": ({"num_nodes": 0}, "num_nodes=0"),
    "no batch": ({"batch_size": 0}, "batch_size=0"),
    "a batch above the shard": ({"batch_size": 65}, "batch_size=65 is more than the 64"),
    "a share above one": ({"p_sparta": 1.5}, "1.5"),
    "an unknown optimizer option": ({"optimizer_kwargs": {"lrr": 1}}, "lrr"),
    "a batch of nothing": ({"batch_size": None}, "batch_size=None"),
    "a model for its class": ({"model_cls": Net()}, "model_cls is a Net: give the class"),
    "no arguments of the model": ({"model_kwargs": None}, "model_kwargs=None"),
    "no loss function": ({"loss_fn": None}, "loss_fn=None: give a function"),
    "a hook that is none": ({"train_loss_hook": 3}, "train_loss_hook=3: give a function"),
    "no pairs": ({"train_dataset": TensorDataset(*DATA.tensors, DATA.tensors[0])}, "of 3: here"),
    "no loss": ({"loss_fn": lambda output, y: output}, "loss_fn returned a Tensor of shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_refused(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(SettingsError, match=message):
        train(**options)
    assert os.listdir() == []


def test_model_kwargs_that_the_model_does_not_take_are_shown() -> None:
    settings = {"optimizer_kwargs": {"lr": 1e-3}, "loss_fn": nn.MSELoss(), "num_nodes": 1}
    data = torch.utils.data.TensorDataset(torch.ones(8, 4), torch.ones(8, 2))

    def simulator(**changes: Any) -> DilocoSimulator:
        given = {"model_cls": nn.Linear, "train_dataset": data, "max_local_step": 1, **settings}
        return DilocoSimulator(**{**given, **changes})

    with pytest.raises(SettingsError, match=r"model_kwargs \(wide=4\): .*wide"):
        simulator(model_kwargs={"wide": 4}).train()
    with pytest.raises(SettingsError, match="loss_fn is the class MSELoss: give an instance"):
        simulator(loss_fn=nn.MSELoss)


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x[0, 0] == 40:
            raise KeyError("image")
        return super().forward(x)


def test_a_model_that_cannot_be_copied_is_made_for_each_node_and_a_run_keeps_what_it_got() -> None:
    x = torch.arange(64.0).view(64, 1).expand(64, 4)
    simulator = DilocoSimulator(
        model_cls=Locked,
        optimizer_kwargs={"lr": 1e-3},
        train_dataset=TensorDataset(x, torch.ones(64, 2)),
        loss_fn=nn.MSELoss(),
        num_nodes=2,
        batch_size=1,
        max_local_step=32,
    )
    with pytest.raises(KeyError, match="image"):
        simulator.train()
    result = simulator.result
    assert result is not None and result.model is None and result.history
    assert {type(model) for model in result.models} == {Locked}
