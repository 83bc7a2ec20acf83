"""What an experiment refuses before its first step, and what it is made into."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch
from helpers.small_runs import Fits
from torch import Tensor, nn

from torchft.errors import SettingsError
from torchft.simulator.events import Dies, Joins
from torchft.simulator.experiment import Experiment
from torchft.simulator.faults import FaultEvent, FaultSchedule
from torchft.simulator.loop import run_stacked
from torchft.simulator.network import NetworkModel
from torchft.simulator.weather import Weather
from torchft.strategies import AllReduceRecipe, DiLoCoStrategy, Inner, LocalSGDRecipe, Strategy


class Untouched(Fits):
    """May not be run."""

    def forward(self, batch: Tensor) -> Tensor:
        raise AssertionError("a step was begun")


def experiment(**settings: Any) -> Experiment:
    defaults = {
        "model": Untouched(),
        "train_dataset": torch.ones(40, 3),
        "strategy": Strategy([AllReduceRecipe()], inner=Inner()),
        "num_nodes": 4,
        "max_steps": 3,
        "batch_size": 5,
        "device": "cpu",
    }
    return Experiment(**{**defaults, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_nodes": 0}, "num_nodes=0: it must be an integer, at least 1"),
        ({"num_nodes": -2}, "num_nodes=-2"),
        ({"num_nodes": 2.0}, "num_nodes=2.0"),
        ({"num_nodes": None}, "num_nodes=None"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"model": lambda size: Fits()}, "is called without arguments"),
        ({"events": [Joins(1, 2, donor=1)]}, "a node cannot heal from itself"),
        ({"events": [Joins(1, 2, donor=7)]}, "the donor must be one of the nodes 0 to 3"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"num_epochs": -1}, "num_epochs=-1"),
        ({"seed": None}, "seed=None: it must be an integer"),
        ({"max_steps": None}, "max_steps or num_epochs"),
        ({"batch_size": 11}, "batch_size=11 is more than the 10 samples of node 0"),
        ({"num_nodes": 41}, "40 samples are too few for 41 nodes"),
        ({"train_dataset": lambda rank: None}, "must take"),
        ({"train_dataset": lambda *a: None}, "NoneType has no length"),
        ({"train_dataset": 5}, "int has no length"),
        ({"strategy": AllReduceRecipe()}, "strategy is a AllReduceRecipe, not a Strategy"),
        ({"strategy": Strategy([AllReduceRecipe()])}, "has no inner optimizer"),
        ({"model": "resnet"}, "model is a str"),
        ({"model": lambda: 3}, "the model factory made a int"),
        ({"node_cls": nn.Module}, "no subclass of TrainNode"),
        ({"device": "warp"}, "device='warp'"),
        ({"device": "meta"}, "use cpu, cuda or mps"),
        ({"autocast": torch.float16}, "autocast=torch.float16"),
        ({"autocast": "bf16"}, "autocast=bf16"),
        ({"events": [Dies(4, 1)]}, "the nodes are 0 to 3"),
        ({"events": Dies(0, 3)}, r"events is one Dies: give a list, \[Dies\(node=0, step=3"),
        ({"events": [3]}, r"3 among the events is none: use Dies\(node, step\)"),
        ({"events": [Dies]}, "Dies among the events is none"),
        ({"events": "Dies"}, "events is a str: give a list"),
        ({"events": [Dies(1, 2.5)]}, r"Dies\(node=1, step=2.5.*: step=2.5: it must be an integer"),
        ({"events": [Dies(True, 2)]}, "node=True: it must be an integer"),
        ({"events": [Dies(1, 2, 3)]}, "in_round=3: it must be one of True, False"),
        ({"events": [Dies(1, 2), Dies(1, 3)]}, "at that step .events count steps from 0"),
        ({"network": "fast"}, "network='fast': give a torchft.simulator.NetworkModel"),
        ({"faults": [Dies(1, 1)]}, "give a torchft.simulator.FaultSchedule"),
        ({"shuffle": "no"}, "shuffle='no': it must be one of True, False"),
        ({"deterministic": 1}, "deterministic=1: it must be one of True, False"),
        ({"dataloader_kwargs": {"drop_last": True}}, "dataloader_kwargs has drop_last"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_the_first_step(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run_stacked(experiment(**settings))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_that_is_not_there_is_not_replaced() -> None:
    with pytest.raises(SettingsError, match="CUDA is not there: use device='cpu'"):
        experiment(device="cuda").check()


def test_an_h_of_true_is_refused_with_the_strategy() -> None:
    with pytest.raises(SettingsError, match="H=True: it must be an integer, at least 1"):
        DiLoCoStrategy(H=True)


def test_an_h_below_one_is_refused_with_the_strategy() -> None:
    with pytest.raises(SettingsError, match="sync_every=0"):
        LocalSGDRecipe(0)


def test_an_unknown_name_is_no_setting() -> None:
    with pytest.raises(TypeError, match="bananas"):
        experiment(bananas=3)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 3}, 3),
        ({"max_steps": None, "num_epochs": 4}, 8),
        ({"max_steps": 5, "num_epochs": 4}, 5),
        ({"max_steps": 9, "num_epochs": 4}, 8),
    ],
)
def test_it_ends_with_whatever_ends_first(limits: dict[str, Any], steps: int) -> None:
    assert experiment(**limits).total_steps == steps
    assert len(run_stacked(experiment(model=Fits(), **limits)).history) == steps


def test_it_travels_with_its_parts() -> None:
    one = experiment(model=Fits(), seed=7)
    one.check()
    there = pickle.loads(pickle.dumps(one))
    assert run_stacked(there).history == run_stacked(one).history


def test_events_of_the_fault_schedule_come_too() -> None:
    faults = FaultSchedule(events=[FaultEvent(node=2, event="dies", step=2)])
    one = experiment(model=Fits(), events=[Dies(1, 1)], faults=faults, network=NetworkModel())
    assert one.all_events() == [Dies(1, 1), Dies(2, 2)]
    result = run_stacked(one)
    assert result.alive == [0, 3]
    assert result.simulated is not None


def test_autocast_is_bfloat16() -> None:
    assert experiment().autocast_dtype is None
    assert experiment(autocast=True).autocast_dtype is torch.bfloat16
    assert experiment(autocast=torch.bfloat16).autocast_dtype is torch.bfloat16


def test_a_data_factory_is_asked_once_for_each_node() -> None:
    calls: list[int] = []

    def factory(rank: int, num_nodes: int, train_dataset: bool) -> Tensor:
        calls.append(rank)
        return torch.ones(10, 3)

    run_stacked(experiment(model=Fits(), train_dataset=factory, max_steps=None, num_epochs=2))
    assert sorted(calls) == [0, 1, 2, 3]


def test_a_model_that_cannot_be_copied_is_refused_with_the_way_round() -> None:
    def locked() -> nn.Module:
        model = Untouched()
        model.lock = threading.Lock()  # type: ignore[assignment]
        return model

    with pytest.raises(
        SettingsError, match=r"Untouched cannot be copied for each.*factory"
    ) as found:
        run_stacked(experiment(model=locked()))
    assert isinstance(found.value.__cause__, TypeError)


def test_parameters_that_have_no_numbers_yet_are_refused_by_name() -> None:
    lazy, meta = Untouched(), Untouched().to("meta")
    lazy.line = nn.LazyLinear(1)  # type: ignore[assignment]
    with pytest.raises(SettingsError, match=r"line.weight has no shape .* send one batch"):
        run_stacked(experiment(model=lazy))
    with pytest.raises(SettingsError, match=r"line.weight is on the device meta"):
        run_stacked(experiment(model=meta))


def test_an_event_after_the_end_is_said_not_to_happen() -> None:
    with pytest.warns(
        UserWarning, match=r"Dies\(node=1, step=3.*does not happen: .* after 3 steps"
    ):
        experiment(events=[Dies(1, 3)], max_steps=3).check()


def test_the_old_setting_weather_gives_both() -> None:
    old = Weather(events=[FaultEvent(node=2, event="dies", step=2)], heartbeat_timeout_s=7.0)
    with pytest.warns(DeprecationWarning, match="network and faults"):
        one = experiment(model=Fits(), weather=old)
    assert one.all_events() == [Dies(2, 2)]
    assert one.network is not None and one.network.heartbeat_timeout_s == 7.0


@pytest.mark.parametrize("new", [{"network": NetworkModel()}, {"faults": FaultSchedule()}])
def test_the_old_weather_with_what_it_is_now_is_refused(new: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="weather is now network and faults, and both are given"):
        experiment(model=Fits(), weather=Weather(), **new)
