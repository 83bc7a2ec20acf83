"""CheckpointFolder: a run that was interrupted and resumed has the bits of one that never was."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_runs import STRATEGIES, Interrupt, bits, odd, pairs
from torch import Tensor
from torch.utils.data import Dataset

from torchft.errors import SettingsError
from torchft.experiments import CSVLogger, Trainer
from torchft.experiments.checkpoint import CheckpointFolder, load_checkpoint, write_whole
from torchft.simulator import Dies, Joins, Result
from torchft.strategies import DiLoCoStrategy, OptimSpec, SimpleReduceStrategy, Strategy

STEPS = 17


def fit(strategy: Strategy, folder: Path, **changes: Any) -> Result:
    data = changes.pop("data", pairs())
    trainer = Trainer(changes.pop("model", odd()), data, pairs(20), device="cpu")
    settings: dict[str, Any] = {
        "num_nodes": 3,
        "max_steps": STEPS,
        "num_epochs": 99,
        "batch_size": 4,
        "val_size": 6,
        "val_interval": 4,
        "correlation_interval": 5,
        "run_name": "run",
        "save_dir": folder / "saved",
        "log_dir": folder / "logs",
    }
    trainer.fit(strategy=strategy, **{**settings, **changes})
    assert trainer.result is not None
    return trainer.result


def interrupted(strategy: Strategy, folder: Path, after: int, **changes: Any) -> None:
    logger = [CSVLogger(folder / "logs" / "run"), Interrupt(after)]
    with pytest.raises(KeyboardInterrupt):
        fit(strategy, folder, logger=logger, **{"checkpoint_interval": 5, **changes})


def disturb_generators() -> None:
    """A resumed run must not live on what its process happens to have drawn."""
    torch.manual_seed(random.randrange(1 << 30))
    np.random.seed(random.randrange(1 << 30))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(
    name: str, tmp_path: Path
) -> None:
    make = STRATEGIES[name]
    whole = bits(fit(make(), tmp_path / "whole"))
    # The last checkpoint is of step 10: between two rounds of those that have H = 4 or 6.
    interrupted(make(), tmp_path, after=13)
    disturb_generators()
    resumed = fit(make(), tmp_path, resume=True, checkpoint_interval=5)
    assert bits(resumed) == whole
    for log in ("train", "validation", "correlation"):
        files = (
            folder / "logs" / "run" / f"{log}.csv" for folder in (tmp_path, tmp_path / "whole")
        )
        assert len({file.read_text() for file in files}) == 1


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples that draw from every generator that there is."""

    def __len__(self) -> int:
        return 80

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(7) + np.random.rand() + random.random()
        return noise + index / 80, torch.tensor(index % 3)


@pytest.mark.parametrize("micro", [None, 2])
def test_data_that_draws_its_own_noise_resumes_too(micro: int | None, tmp_path: Path) -> None:
    whole = bits(fit(DiLoCoStrategy(H=4), tmp_path / "a", data=Noisy(), minibatch_size=micro))
    interrupted(DiLoCoStrategy(H=4), tmp_path, 13, data=Noisy(), minibatch_size=micro)
    disturb_generators()
    resumed = fit(DiLoCoStrategy(H=4), tmp_path, data=Noisy(), minibatch_size=micro, resume=True)
    assert bits(resumed) == whole


@pytest.mark.parametrize("after", [7, 13])
def test_a_run_with_a_death_and_a_heal_resumes_on_either_side_of_it(
    after: int, tmp_path: Path
) -> None:
    events = [Dies(node=1, step=3), Joins(node=1, step=9)]
    whole = fit(DiLoCoStrategy(H=4), tmp_path / "whole", events=events)
    assert whole.heals
    interrupted(DiLoCoStrategy(H=4), tmp_path, after, events=events)
    resumed = fit(DiLoCoStrategy(H=4), tmp_path, events=events, resume=True)
    assert bits(resumed) == bits(whole)


def test_a_checkpoint_waits_until_no_round_is_in_flight(tmp_path: Path) -> None:
    make = STRATEGIES["streaming_late"]
    whole = bits(fit(make(), tmp_path / "whole"))
    # A round opens after step 5 and closes after step 7.
    interrupted(make(), tmp_path, after=9)
    assert [path.name for path in (tmp_path / "saved" / "run").iterdir()] == ["step_00000007.pt"]
    assert bits(fit(make(), tmp_path, resume=True)) == whole


def test_the_last_checkpoint_has_what_was_still_in_flight(tmp_path: Path) -> None:
    make = STRATEGIES["streaming_late"]
    # A round opens after step 15, and would close after step 17.
    whole = fit(make(), tmp_path, max_steps=16, checkpoint_interval=50)
    assert [(r.step, r.delay) for r in whole.rounds[-2:]] == [(13, 2), (15, 1)]
    again = fit(make(), tmp_path, max_steps=16, resume=True)
    assert bits(again) == bits(whole)
    assert whole.validations[-1]["step"] == 16


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"val_size": 0, "correlation_interval": None}
    whole = bits(fit(DiLoCoStrategy(H=4), tmp_path / "whole", max_steps=12, **quiet))
    fit(DiLoCoStrategy(H=4), tmp_path, max_steps=6, checkpoint_interval=6, **quiet)
    longer = fit(DiLoCoStrategy(H=4), tmp_path, max_steps=12, resume=True, **quiet)
    assert bits(longer) == whole


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    whole = fit(DiLoCoStrategy(H=4), tmp_path, checkpoint_interval=5)
    again = fit(DiLoCoStrategy(H=4), tmp_path, checkpoint_interval=5, resume=True)
    assert bits(again) == bits(whole)


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, r"seed: 42 → 1"),
    "nodes": ({"num_nodes": 2}, r"num_nodes: 3 → 2"),
    "batch": ({"batch_size": 5}, r"batch_size: 4 → 5"),
    "events": ({"events": [Dies(1, 15)]}, r"events: \[\] → "),
    "model": (
        {"model": torch.nn.Bilinear(2, 2, 2)},
        r"model\.into\.weight: \[5, 7\] float32 → not",
    ),
    "data": ({"data": pairs(200)}, r"batches_per_epoch: 6 → 16"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_checkpoint_of_another_experiment_is_refused_with_what_differs(
    name: str, tmp_path: Path
) -> None:
    fit(DiLoCoStrategy(H=4), tmp_path, checkpoint_interval=17)
    changes, message = DIFFERENT[name]
    with pytest.raises(SettingsError, match=message):
        fit(DiLoCoStrategy(H=4), tmp_path, resume=True, minibatch_size=4, **changes)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (lambda: DiLoCoStrategy(H=5), r"recipes\[0\]\.sync_every: 4 → 5"),
        (lambda: DiLoCoStrategy(OptimSpec(lr=0.5), H=4), r"kwargs\.lr: nothing → 0\.5"),
        (SimpleReduceStrategy, r"strategy\.class: DiLoCoStrategy → SimpleReduceStrategy"),
    ],
)
def test_another_strategy_is_another_experiment(
    strategy: Any, message: str, tmp_path: Path
) -> None:
    fit(DiLoCoStrategy(H=4), tmp_path, checkpoint_interval=17)
    with pytest.raises(SettingsError, match=message):
        fit(strategy(), tmp_path, resume=True)


def test_a_cosine_over_another_length_is_another_experiment(tmp_path: Path) -> None:
    fit(STRATEGIES["diloco"](), tmp_path, checkpoint_interval=17)
    with pytest.raises(SettingsError, match="total_steps: 17 → 30"):
        fit(STRATEGIES["diloco"](), tmp_path, max_steps=30, resume=True)


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    fit(DiLoCoStrategy(H=4), tmp_path, checkpoint_interval=2, keep_checkpoints=2)
    names = sorted(path.name for path in (tmp_path / "saved" / "run").iterdir())
    assert names == ["step_00000016.pt", "step_00000017.pt"]


def test_a_resumed_run_needs_a_checkpoint_and_to_know_which(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no checkpoint in .*saved/run"):
        fit(DiLoCoStrategy(H=4), tmp_path, resume=True)
    with pytest.raises(SettingsError, match="run_name"):
        fit(DiLoCoStrategy(H=4), tmp_path, resume=True, run_name=None)


def test_ctrl_c_says_where_the_run_is_and_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(DiLoCoStrategy(H=4), tmp_path, 12)
    at = tmp_path / "saved" / "run" / "step_00000010.pt"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"run: stopped after step 12; the last checkpoint is {at}; go on with resume=True and "
        "run_name='run'"
    )
    interrupted(DiLoCoStrategy(H=4), tmp_path, 13, resume=True, checkpoint_interval=None)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"step 13; the last checkpoint is {at}; go on with resume={str(at)!r}")
    interrupted(DiLoCoStrategy(H=4), tmp_path, 3, checkpoint_interval=None)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "run: stopped after step 3; there is no checkpoint to go on from"


def test_a_path_says_which_run_it_is(tmp_path: Path) -> None:
    fit(DiLoCoStrategy(H=4), tmp_path, checkpoint_interval=10)
    at = tmp_path / "saved" / "run" / "step_00000010.pt"
    fit(DiLoCoStrategy(H=4), tmp_path, resume=at, run_name=None)
    assert [folder.name for folder in (tmp_path / "logs").iterdir()] == ["run"]


def test_a_new_run_does_not_mix_with_the_checkpoints_of_an_earlier_one(tmp_path: Path) -> None:
    fit(DiLoCoStrategy(H=4), tmp_path, checkpoint_interval=10)
    with pytest.raises(SettingsError, match=r"earlier run.*resume=True"):
        fit(DiLoCoStrategy(H=4), tmp_path, checkpoint_interval=10)


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    fit(DiLoCoStrategy(H=4), tmp_path, checkpoint_interval=10)
    with pytest.raises(SettingsError, match="17 steps behind it, more than the 9"):
        fit(DiLoCoStrategy(H=4), tmp_path, max_steps=9, resume=True)


def test_a_file_holds_tensors_and_plain_data_only(tmp_path: Path) -> None:
    fit(STRATEGIES["fedavg"](), tmp_path, checkpoint_interval=10)
    at = tmp_path / "saved" / "run" / "step_00000010.pt"
    assert torch.serialization.get_unsafe_globals_in_checkpoint(at) == []
    assert load_checkpoint(at).step == 10


def test_what_would_need_code_to_load_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.pt"
    write_whole(path, {"kept": 1})
    with pytest.raises(SettingsError, match="CheckpointFolder"):
        write_whole(path, {"thing": CheckpointFolder(tmp_path)})
    assert torch.load(path, weights_only=True) == {"kept": 1}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_process_that_ends_while_it_writes_leaves_the_older_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(3, {}, {"weights": torch.ones(10)})

    def half(content: Any, file: Any) -> None:
        file.write(b"PK half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    for step in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(step, {}, {"weights": torch.zeros(10)})
    monkeypatch.undo()
    saved = load_checkpoint(tmp_path)
    assert saved.step == 3 and torch.equal(saved.state["weights"], torch.ones(10))
    assert os.listdir(tmp_path) == ["step_00000003.pt"]


def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    path = checkpoints.save(3, {}, {"weights": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(SettingsError, match=r"step_00000003\.pt cannot be read"):
        load_checkpoint(tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    write_whole(tmp_path / "model.pt", {"weight": torch.ones(2)})
    with pytest.raises(SettingsError, match="no checkpoint of a run"):
        load_checkpoint(tmp_path / "model.pt")


def test_keeping_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="keep_checkpoints=0"):
        CheckpointFolder("x", keep=0)


def test_a_file_of_something_else_is_refused_without_the_advice_to_unpickle_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "step_00000003.pt"
    path.write_bytes(b"x" * 100)
    with pytest.raises(SettingsError, match=r"step_00000003\.pt cannot be read") as refused:
        load_checkpoint(path)
    assert "weights_only" not in str(refused.value)
