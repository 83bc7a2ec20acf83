"""EXO Gym's paths and names: all are there, and only what changes nothing is passed over."""

from __future__ import annotations

import importlib
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import odd, pairs
from torch import nn

import torchft.compat
from torchft.compat import (
    CommunicateOptimizeStrategy,
    DeMoStrategy,
    DiLoCoCommunicator,
    DiLoCoStrategy,
    FedAvgStrategy,
    OptimSpec,
    SimpleReduceStrategy,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    Strategy,
    Trainer,
    all_gather,
    all_reduce,
    broadcast,
    get_device,
)
from torchft.compat.exogym.strategy.federated_averaging import AveragingCommunicator
from torchft.compat.exogym.strategy.sparta import (
    IndexSelector,
    PartitionedIndexSelector,
    RandomIndexSelector,
    ShuffledSequentialIndexSelector,
)
from torchft.errors import SettingsError
from torchft.experiments import Trainer as SimulatorTrainer

PATHS = {
    "": ["Trainer", "TrainNode", "LocalTrainer"],
    ".trainer": ["Trainer", "LocalTrainer"],
    ".train_node": ["TrainNode"],
    ".aux.utils": ["get_device"],
    ".strategy": [
        *("Strategy", "DiLoCoStrategy", "DiLoCoCommunicator", "OptimSpec", "SPARTAStrategy"),
        *("FedAvgStrategy", "CommunicateOptimizeStrategy", "SPARTADiLoCoStrategy"),
        *("DeMoStrategy", "SparseCommunicator", "SimpleReduceStrategy"),
    ],
    ".strategy.strategy": ["Strategy", "SimpleReduceStrategy"],
    ".strategy.optim": ["OptimSpec", "ensure_optim_spec"],
    ".strategy.communicate": ["all_reduce", "broadcast", "all_gather"],
    ".strategy.communicate_optimize_strategy": [
        "CommunicateOptimizeStrategy",
        "CommunicationModule",
    ],
    ".strategy.diloco": ["DiLoCoStrategy", "DiLoCoCommunicator"],
    ".strategy.federated_averaging": ["FedAvgStrategy", "AveragingCommunicator"],
    ".strategy.sparta": ["SPARTAStrategy", "SparseCommunicator", "RandomIndexSelector"],
    ".strategy.sparta_diloco": ["SPARTADiLoCoStrategy"],
    ".strategy.demo": ["DeMoStrategy"],
}

NAMED = [
    *(SimpleReduceStrategy, FedAvgStrategy, DiLoCoStrategy, SPARTAStrategy),
    *(SPARTADiLoCoStrategy, DeMoStrategy),
]
every_name = pytest.mark.parametrize("cls", NAMED, ids=lambda cls: cls.__name__)


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.mark.parametrize("path", PATHS)
def test_what_scripts_import_by_path_is_there(path: str) -> None:
    module = importlib.import_module(f"torchft.compat.exogym{path}")
    for name in PATHS[path]:
        found = getattr(module, name)
        assert getattr(torchft.compat, name, found) is found


def test_all_names_of_the_room_are_there() -> None:
    assert all(hasattr(torchft.compat, name) for name in torchft.compat.__all__)


class TestWhatChangesNothing:
    """Said in one warning, and left out."""

    @every_name
    def test_h_and_p_where_there_are_none(self, cls: Any) -> None:
        known = inspect.signature(cls).parameters
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            strategy = cls(H=3, p=0.05)
        assert len(said) == 1
        assert "p=0.05: left out" in str(said[0].message)
        assert ("H=3" in str(said[0].message)) == ("H" not in known)
        assert strategy.config().get("H", 3) == 3

    @every_name
    @pytest.mark.parametrize("given", [{"async_sparta_delay": 0}, {"device": ""}, {"device": None}])
    def test_values_that_ask_for_nothing(self, cls: Any, given: dict[str, Any]) -> None:
        with pytest.warns(UserWarning, match=f"no {next(iter(given))}="):
            cls(**given)

    @every_name
    @pytest.mark.parametrize(
        "given",
        [{"async_sparta_delay": 1}, {"device": "cuda:9"}, {"bananas": 3}, {"outer_lr": 0.7}],
        ids=str,
    )
    def test_what_asks_for_something_is_still_refused(
        self, cls: Any, given: dict[str, Any]
    ) -> None:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(given))}'"):
            cls(**given)

    @every_name
    def test_nothing_is_said_where_nothing_is_left_out(self, cls: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            strategy = cls(optim_spec="sgd", max_norm=1.0, lr_scheduler="lambda_cosine")
        again = pickle.loads(pickle.dumps(strategy))
        assert again.config() == strategy.config()
        assert strategy.config()["strategy"] == cls.__name__

    def test_demo_takes_the_rate_of_an_optimizer_that_exo_gym_ignores(self) -> None:
        adamw = OptimSpec(torch.optim.AdamW, lr=0.123, weight_decay=0.2)
        with pytest.warns(UserWarning, match=r"AdamW, lr=0.123.* only lr=0.123"):
            strategy = DeMoStrategy(optim_spec=adamw, weight_decay=0.2)
        assert strategy.config()["optim"] == {"name": "SGD", "lr": 0.123, "weight_decay": 0.2}


class TestTrainer:
    """What scripts count on."""

    def fit(self, **settings: Any) -> Trainer:
        trainer = Trainer(odd(), pairs(), device=settings.pop("init_device", "cpu"))
        made: dict[str, Any] = {"strategy": DiLoCoStrategy("sgd", H=2), "num_nodes": 2}
        trainer.fit(max_steps=2, batch_size=4, **{**made, **settings})
        return trainer

    def test_an_empty_device_is_the_best_one(self) -> None:
        trainer = self.fit(device="", init_device="", logger="none")
        assert trainer.result is not None and trainer.result.model is not None
        assert next(trainer.result.model.parameters()).device.type == get_device()

    def test_the_simulators_own_trainer_takes_it_too(self) -> None:
        trainer = SimulatorTrainer(odd(), pairs(), device="")
        strategy = DiLoCoStrategy("sgd", H=2)
        trainer.fit(1, strategy, 2, max_steps=2, batch_size=4, device="", logger="none")

    def test_devices_that_are_not_there_are_left_out(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.warns(UserWarning, match=r"devices=\[0, 1\].* CUDA is not there") as said:
            trainer = Trainer(odd(), pairs(), devices=[0, 1])
        assert len(said) == 1 and trainer.devices is None

    def test_a_kind_of_device_that_is_not_there_is_left_out(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        with pytest.warns(UserWarning, match="device='mps' is not there") as said:
            trainer = self.fit(device="mps", logger="none")
        assert sum("mps" in str(one.message) for one in said) == 1
        assert trainer.result is not None and len(trainer.result.history) == 2

    def test_a_second_run_of_a_script_gets_a_name_of_its_own(self) -> None:
        self.fit(run_name="mine")
        with pytest.warns(UserWarning, match=r"logs/mine holds .* is called mine_2"):
            self.fit(run_name="mine")
        assert Path("logs/mine/train.csv").exists() and Path("logs/mine_2/train.csv").exists()

    def test_kwargs_that_nobody_reads_are_said(self) -> None:
        with pytest.warns(UserWarning, match=r"fit\(kwargs=.*dataset_name.* is left out"):
            self.fit(kwargs={"dataset_name": "owt"}, logger="none")

    def test_an_unknown_setting_is_an_error(self) -> None:
        with pytest.raises(TypeError, match="bananas"):
            self.fit(bananas=3)


class Own(Strategy):
    def step(self) -> None:
        self.optim.step()
        super().step()


class TestOwnStrategy:
    """One that calls collectives is a program of each process."""

    def test_every_keyword_becomes_an_attribute(self) -> None:
        own: Any = Own(lr_scheduler="lambda_cosine", beta=0.3)
        assert (own.beta, own.lr_scheduler, own.local_step) == (0.3, "lambda_cosine", 0)

    def test_in_one_process_it_is_told_what_it_needs(self) -> None:
        trainer = SimulatorTrainer(odd(), pairs())
        with pytest.raises(SettingsError, match=r"Own calls .* fit\(processes=True\)"):
            trainer.fit(1, Own(), 2)

    @pytest.mark.parametrize(
        "given", [{"deterministic": True}, {"digests": True}, {"checkpoint_interval": 1}], ids=str
    )
    def test_what_only_recipes_can_do_is_refused(self, given: dict[str, Any]) -> None:
        with pytest.raises(SettingsError, match=next(iter(given))):
            Trainer(odd(), pairs()).fit(1, Own(), 2, logger="none", **given)

    def test_a_subclass_of_a_name_that_overrides_its_step_is_not_passed_over(self) -> None:
        class Noisy(SimpleReduceStrategy):
            def step(self) -> bool:
                return super().step()

        class Islands(DiLoCoStrategy):
            def _communicate(self) -> None:
                """Never called here."""

        with pytest.raises(
            SettingsError, match=r"Noisy overrides step of SimpleReduceStrategy.*processes"
        ):
            Noisy()
        with pytest.raises(SettingsError, match="Islands overrides _communicate"):
            Islands(H=3)

    def test_a_subclass_of_a_name_may_have_other_defaults(self) -> None:
        class Slow(DiLoCoStrategy):
            def __init__(self, **options: Any) -> None:
                super().__init__(H=500, **options)

        assert Slow(optim_spec="sgd").config()["H"] == 500

    @pytest.mark.parametrize(
        "collective",
        [lambda t: all_reduce(t), lambda t: broadcast(t), lambda t: all_gather([t], t)],
        ids=["all_reduce", "broadcast", "all_gather"],
    )
    def test_a_collective_outside_a_run_says_where_it_belongs(self, collective: Any) -> None:
        with pytest.raises(SettingsError, match=r"fit\(processes=True\)"):
            collective(torch.ones(2))

    def test_a_composition_names_its_optimizer_in_three_ways(self) -> None:
        for name in ("optim_spec", "inner_optim", "inner_optim_spec"):
            made = CommunicateOptimizeStrategy([DiLoCoCommunicator()], **{name: "sgd"})  # type: ignore[arg-type]
            assert made.inner_optim_spec.cls is torch.optim.SGD
            assert made.communication_modules[0].strategy is made
        assert CommunicateOptimizeStrategy([]).inner_optim_spec.cls is torch.optim.AdamW


class TestSelectors:
    """Masks of a parameter's shape."""

    weight = nn.Parameter(torch.zeros(10, 7))

    def test_all_and_at_random(self) -> None:
        torch.manual_seed(3)
        assert IndexSelector().get_indices(self.weight, 0).all()
        mask = RandomIndexSelector(0.3).get_indices(self.weight, 0)
        assert mask.shape == (10, 7) and 8 < int(mask.sum()) < 35

    @pytest.mark.parametrize("cls", [ShuffledSequentialIndexSelector, PartitionedIndexSelector])
    def test_in_turn_each_number_once(self, cls: Any) -> None:
        selector = cls(0.3)
        walk = [selector.get_indices(self.weight, i) for i in range(4)]
        assert torch.equal(torch.stack(walk).sum(0), torch.ones(10, 7, dtype=torch.int64))
        again = torch.equal(selector.get_indices(self.weight, 4), walk[0])
        assert again == (cls is ShuffledSequentialIndexSelector)

    def test_no_share_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="p=0"):
            RandomIndexSelector(0)


def test_islands_part_all_nodes_and_all_agree() -> None:
    averaging = AveragingCommunicator(island_size=2)
    for step in range(5):
        islands = [averaging._island(rank, 5, step) for rank in range(5)]
        assert all(rank in island for rank, island in enumerate(islands))
        assert {len(island) for island in islands} == {1, 2}
        assert all(islands[one] == island for island in islands for one in island)


def test_the_communicator_of_diloco_keeps_an_fp32_master_of_a_bf16_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An old failing: at an outer rate of 0.3 twenty rounds moved nothing, where fp32 has .977."""
    monkeypatch.setattr("torchft.compat.exogym.strategy.communicate.all_reduce", lambda _: None)
    model = torch.nn.Linear(3, 2).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    made = DiLoCoCommunicator(outer_optim_spec=OptimSpec(torch.optim.SGD, lr=0.3))
    made._init_node(model, 0, 1)
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(2.0**-8)
        made._outer_step(model, 1)
    for master, own in zip(made.master_model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(master, torch.full_like(master, 1 - 20 * 0.3 * 2**-8), atol=1e-6)
        assert torch.equal(own, master.bfloat16())
