"""Validation: the right samples, the right numbers, and looking changes nothing of the run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import Odd, bits, odd, pairs
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from torchft.errors import SettingsError
from torchft.experiments import Trainer
from torchft.experiments.validation import Validator, as_it_was
from torchft.simulator import Experiment, Result, TrainNode
from torchft.strategies import DiLoCoStrategy


def experiment(**changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "model": odd(),
        "train_dataset": pairs(),
        "val_dataset": pairs(20),
        "strategy": DiLoCoStrategy(H=4),
        "num_nodes": 2,
        "max_steps": 9,
        "batch_size": 8,
        "device": "cpu",
    }
    return Experiment(**{**settings, **changes})


class Mean(nn.Module):
    """Its loss is the mean of the samples plus a weight, so that it tells what it saw."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, batch: Tensor) -> Tensor:
        return batch.mean() + self.weight


def look_at(size: int, data: Any, weights: tuple[float, ...] = (0.0,), batch_size: int = 8) -> Any:
    run = experiment(
        model=Mean(0.0), train_dataset=torch.zeros(40), val_dataset=data, batch_size=batch_size
    )
    return Validator(run, size)([run.make_node(Mean(w), n) for n, w in enumerate(weights)])


@pytest.mark.parametrize("batch_size", [1, 3, 8, 20])
def test_every_sample_counts_alike_whatever_the_batch(batch_size: int) -> None:
    data = torch.arange(20.0)
    assert look_at(20, data, batch_size=batch_size).global_loss == pytest.approx(data.mean().item())


def test_a_size_below_the_batch_works() -> None:
    values = {look_at(1, torch.arange(20.0)).global_loss for _ in range(3)}
    assert len(values) == 1
    assert values <= set(range(20))


def test_more_than_there_are_is_all_of_them() -> None:
    assert look_at(500, torch.arange(20.0)).global_loss == pytest.approx(9.5)


def test_local_is_each_nodes_own_and_global_the_mean_models() -> None:
    seen = look_at(20, torch.zeros(20), weights=(1.0, 2.0, 6.0))
    assert seen.local_losses == {0: 1.0, 1: 2.0, 2: 6.0}
    assert (seen.local_loss, seen.global_loss) == (3.0, 3.0)


def test_the_mean_model_is_not_the_mean_of_losses() -> None:
    class Square(Mean):
        def forward(self, batch: Tensor) -> Tensor:
            return self.weight**2

    run = experiment(model=Square(0.0), val_dataset=torch.zeros(4))
    seen = Validator(run, 4)([run.make_node(Square(w), n) for n, w in enumerate((-1.0, 3.0))])
    assert (seen.local_loss, seen.global_loss) == (5.0, 1.0)


def test_a_factory_is_asked_for_validation_data() -> None:
    asked: list[tuple[int, int, bool]] = []

    def make(rank: int, num_nodes: int, train_dataset: bool) -> Tensor:
        asked.append((rank, num_nodes, train_dataset))
        return torch.ones(5)

    assert look_at(5, make).global_loss == 1.0
    assert asked == [(0, 2, False), (1, 2, False)]


def test_each_node_is_looked_at_on_its_own_held_out_data_and_the_mean_on_all() -> None:
    def of_its_own(rank: int, num_nodes: int, train_dataset: bool) -> Tensor:
        return torch.full((4,), 10.0 * rank)

    seen = look_at(4, of_its_own, weights=(1.0, 3.0))
    assert seen.local_losses == {0: 0 + 1, 1: 10 + 3}
    assert seen.global_loss == ((0 + 2) + (10 + 2)) / 2


def test_one_data_set_for_all_is_looked_at_once() -> None:
    held_out, seen = torch.ones(4), []

    class Counts(Mean):
        def forward(self, batch: Tensor) -> Tensor:
            seen.append(len(batch))
            return super().forward(batch)

    run = experiment(val_dataset=lambda *of: held_out, num_nodes=2)
    validator = Validator(run, 4)
    validator([run.make_node(Counts(1.0), node) for node in range(2)])
    assert sum(seen) == 3 * 4  # two nodes and their mean


def test_an_empty_share_of_held_out_data_says_whose_it_is() -> None:
    def last_is_empty(rank: int, num_nodes: int, train_dataset: bool) -> Tensor:
        return torch.ones(0 if rank == 1 else 4)

    with pytest.raises(SettingsError, match="val_dataset of node 1: 0 samples"):
        look_at(4, last_is_empty)


def test_dicts_and_a_collate_function_pass() -> None:
    class Words(Dataset[int]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> int:
            return index

    class Total(Mean):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch["n"].mean() + self.weight

    run = experiment(
        model=Total(0.0),
        val_dataset=Words(),
        batch_size=4,
        dataloader_kwargs={"collate_fn": lambda items: {"n": torch.tensor(items).float()}},
    )
    assert Validator(run, 6)([run.make_node(Total(0.0), 0)]).global_loss == 2.5


def test_validation_data_without_samples_is_refused_before_the_first_step() -> None:
    with pytest.raises(SettingsError, match="val_dataset: 0 samples"):
        Validator(experiment(val_dataset=TensorDataset(torch.zeros(0, 7), torch.zeros(0))), 4)


def test_a_factory_of_validation_data_with_other_arguments_is_refused() -> None:
    with pytest.raises(SettingsError, match="must take"):
        Validator(experiment(val_dataset=lambda: torch.ones(5, 7)), 4)


class Restless(Odd):
    """Counts its passes in a buffer, replaces another, and draws even where it only evaluates."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, batch: Any) -> Tensor:
        self.passes += 1
        self.last = torch.randn(3)
        return super().forward(batch) + torch.rand(()) * 1e-3


def test_modes_are_restored_module_by_module() -> None:
    model = odd()
    model.norm.eval()
    before = [module.training for module in model.modules()]
    with as_it_was(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    assert not all(before) and any(before)


def test_modes_and_buffers_are_restored_after_an_error_too() -> None:
    model = Restless()
    with pytest.raises(RuntimeError), as_it_was(model):
        model.passes += 5
        raise RuntimeError
    assert model.training and model.passes == 0


def test_looking_changes_neither_buffers_nor_generators() -> None:
    run = experiment(model=Restless())
    node: TrainNode = run.make_node(Restless().train(), 0)
    before = copy.deepcopy(node.model.state_dict())
    validator, state = Validator(run, 6), torch.get_rng_state()
    first = validator([node])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in node.model.state_dict().items())
    assert node.model.training
    assert validator([node]) == first  # the same samples and the same noise


def _fit(folder: Path, model: nn.Module | None = None, **settings: Any) -> Result:
    trainer = Trainer(model or Restless(), pairs(), pairs(20), device="cpu")
    trainer.fit(
        strategy=DiLoCoStrategy(H=4),
        num_nodes=2,
        max_steps=9,
        num_epochs=9,
        batch_size=4,
        log_dir=folder,
        disable_logging=True,
        **settings,
    )
    assert trainer.result is not None
    return trainer.result


def test_a_run_that_is_looked_at_computes_what_it_would_have_computed(tmp_path: Path) -> None:
    torch.manual_seed(3)
    looked = _fit(tmp_path, val_size=6, val_interval=2, correlation_interval=3)
    assert [found["step"] for found in looked.validations] == [0, 2, 4, 6, 8, 9]
    assert [found["step"] for found in looked.correlations] == [3, 6, 9]
    looked.validations, looked.correlations = [], []
    torch.manual_seed(3)
    assert bits(_fit(tmp_path, val_size=0)) == bits(looked)


class Linear(nn.Module):
    """Nothing but weights, so that synchronised nodes are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 3)

    def forward(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.linear(batch[0]), batch[1])


def test_local_and_global_are_one_at_a_synchronisation_and_differ_before(tmp_path: Path) -> None:
    looks = _fit(tmp_path, model=Linear(), val_interval=1).validations
    apart = [len({*found["local_losses"].values(), found["global_loss"]}) for found in looks]
    assert apart == [1, 3, 3, 3, 1, 3, 3, 3, 1, 3]


def test_a_teacher_that_the_forward_pass_updates_is_as_it_was_after_a_look() -> None:
    class Taught(Mean):
        def __init__(self, weight: float) -> None:
            super().__init__(weight)
            self.teacher = nn.Parameter(torch.tensor(weight), requires_grad=False)

        def forward(self, batch: Tensor) -> Tensor:
            self.teacher.data.add_(1.0)
            return super().forward(batch)

    run = experiment(model=Taught(0.0), train_dataset=torch.zeros(40), val_dataset=torch.ones(4))
    node = run.make_node(Taught(2.0), 0)
    Validator(run, 4)([node])
    assert float(node.model.teacher.detach()) == 2.0  # type: ignore[union-attr, operator]


def test_held_out_data_that_cannot_be_read_say_so_and_whose_they_are() -> None:
    class Fails(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, at: int) -> Tensor:
            raise KeyError("image")

    with pytest.raises(SettingsError, match=r"val_dataset: KeyError\('image'\)"):
        look_at(4, Fails())
    with pytest.raises(SettingsError, match=r"val_dataset of node 0: KeyError\('image'\)"):
        look_at(4, lambda *of: Fails())


def test_an_error_of_a_model_in_a_look_names_the_node() -> None:
    class Breaks(Mean):
        def forward(self, batch: Tensor) -> Tensor:
            raise ZeroDivisionError("no batch")

    run = experiment(model=Mean(0.0), train_dataset=torch.zeros(40), val_dataset=torch.ones(4))
    with pytest.raises(ZeroDivisionError) as found:
        Validator(run, 4)([run.make_node(Mean(0.0), 0), run.make_node(Breaks(0.0), 1)])
    assert found.value.__notes__ == ["(node 1, held-out data)"]
