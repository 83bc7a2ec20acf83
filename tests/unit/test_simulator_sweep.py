"""A sweep of small runs: what is planned, kept, skipped, lost, and refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.sweeps import TINY
from torchft import strategies
from torchft.errors import SettingsError
from torchft.experiments import config, datasets, models, registry
from torchft.experiments.config import SimulateConfig, StrategyConfig, from_mapping
from torchft.experiments.datasets import digits, text
from torchft.experiments.registry import DATA_OF
from torchft.experiments.runs import RunReport
from torchft.experiments.sweep import Failure, experiment_of, plan, run_one, run_sweep
from torchft.simulator.feed import Feed
from torchft.simulator.loop import run_stacked
from torchft.simulator.network import NetworkModel, NodeProfile
from torchft.simulator.simulated_time import forecast

HERE = "tests.helpers.sweeps"


def tiny(**changes: Any) -> SimulateConfig:
    return from_mapping({**TINY, **changes})


class Ends:
    """Counts what a sweep tells."""

    def __init__(self) -> None:
        self.steps = 0
        self.runs: list[RunReport | Failure] = []

    def told(self) -> dict[str, Any]:
        return {"on_step": self._add, "on_run": self.runs.append}

    def _add(self, steps: int) -> None:
        self.steps += steps


def test_every_combination_is_a_run() -> None:
    specs = plan(tiny(nodes=[2, 3], sync_every=[2, 4], seeds=[0, 1], equal="steps"))
    # All-reduce has no H: 2 nodes x 2 seeds of it, and 2 x 2 x 2 of DiLoCo.
    assert [spec.strategy.name for spec in specs] == ["all_reduce"] * 4 + ["diloco"] * 8
    assert {spec.sync_every for spec in specs if spec.strategy.name == "all_reduce"} == {None}
    assert len(set(specs)) == 12


def test_with_twice_the_nodes_half_the_steps() -> None:
    steps = {spec.nodes: spec.steps for spec in plan(tiny(nodes=[2, 4], sync_every=2))}
    assert steps == {2: 12, 4: 6}


def test_or_equal_steps() -> None:
    assert {spec.steps for spec in plan(tiny(nodes=[2, 4], equal="steps"))} == {12}


def test_a_run_without_a_round_is_refused() -> None:
    with pytest.raises(SettingsError, match="diloco on 8 nodes would end after 3 steps"):
        plan(tiny(nodes=[2, 8], strategies="diloco"))


def test_runs_leave_reports(tmp_path: Path) -> None:
    ends = Ends()
    sweep = run_sweep(tiny(), tmp_path, **ends.told())
    assert [report.spec for report in sweep.reports] == plan(sweep.config)
    assert (sweep.failures, sweep.skipped) == ([], 0)
    assert (ends.steps, len(ends.runs)) == (24, 2)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    for report in sweep.reports:
        assert [step for step, _ in report.validations] == [0, 5, 10, 12]
        assert report.final_loss < report.validations[0][1]
        assert len(report.losses) == 12


def test_bytes_of_a_node_are_those_of_its_rounds(tmp_path: Path) -> None:
    reduce, diloco = run_sweep(tiny(), tmp_path).reports
    # Of 2 nodes each sends half of 4 numbers twice, in 12 rounds and in 3.
    assert (reduce.parameters, reduce.bytes_per_node) == (4, 12 * 16)
    assert diloco.bytes_by_step == [0.0] * 3 + [16.0] * 4 + [32.0] * 4 + [48.0]


def test_what_has_ended_is_not_run_again(tmp_path: Path) -> None:
    first = run_sweep(tiny(), tmp_path)
    ends = Ends()
    again = run_sweep(tiny(seeds=[0, 1]), tmp_path, **ends.told())
    assert again.skipped == 2
    assert [run.spec.seed for run in ends.runs] == [1, 1]
    assert ends.steps == 4 * 12
    assert first.reports == [report for report in again.reports if report.spec.seed == 0]


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        ({"networks": {"lan": {"nodes": [{"step_s": 1}]}}}, 0),
        ({"network": {"nodes": [{"step_s": 1}], "heartbeat_timeout_s": 1}}, 0),
        ({"network": None}, 0),
        ({"target_loss": 1.0}, 0),
        ({"strategies": [{"name": "all_reduce", "label": "mean"}, "diloco"]}, 0),
        (
            {
                "strategies": [
                    "all_reduce",
                    {"name": "diloco", "options": {"outer_optimizer": "sgd"}},
                ]
            },
            1,
        ),
        ({"faults": {"events": [{"node": 1, "event": "dies", "step": 8}]}}, 2),
        ({"batch_size": 8}, 2),
        ({"max_norm": 1.0}, 2),
    ],
)
def test_only_what_changes_the_learning_runs_again(
    tmp_path: Path, change: dict[str, Any], runs: int
) -> None:
    run_sweep(tiny(), tmp_path)
    assert run_sweep(tiny(**change), tmp_path).skipped == 2 - runs


def test_a_file_that_is_no_report_is_named(tmp_path: Path) -> None:
    run_sweep(tiny(), tmp_path)
    broken = next((tmp_path / "runs").glob("diloco-*"))
    broken.write_text(json.dumps({"losses": []}))
    with pytest.raises(SettingsError, match=f"{broken.name} is no finished run.*delete it"):
        run_sweep(tiny(), tmp_path)


def test_a_run_that_fails_costs_no_other_one(tmp_path: Path) -> None:
    ends = Ends()
    config = tiny(strategies=[f"{HERE}:noisy", "all_reduce"])
    sweep = run_sweep(config, tmp_path, **ends.told())
    (failure,) = sweep.failures
    assert failure.spec.strategy.name == f"{HERE}:noisy"
    assert "loss of node 0 in step" in failure.error
    assert [report.spec.strategy.name for report in sweep.reports] == ["all_reduce"]
    assert run_sweep(config, tmp_path).skipped == 1


def test_an_error_that_is_not_ours_shows_the_way_to_it(tmp_path: Path) -> None:
    sweep = run_sweep(tiny(model=f"{HERE}:raising", strategies="all_reduce"), tmp_path)
    assert "the model is broken" in sweep.failures[0].error
    assert "sweeps.py" in sweep.failures[0].error


def test_the_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    run_sweep(tiny(strategies="all_reduce"), tmp_path)
    assert torch.get_num_threads() == before


def test_one_run_is_asked_about_two_networks(tmp_path: Path) -> None:
    (report,) = run_sweep(tiny(strategies="all_reduce"), tmp_path).reports
    fast = report.forecast(NetworkModel(nodes=[NodeProfile(step_s=1.0)]))
    slow = report.forecast(NetworkModel(nodes=[NodeProfile(step_s=1.0, up_bps=64.0)]))
    # Each step sends 16 bytes, 128 bits, at 64 a second.
    assert (fast.elapsed_s, slow.elapsed_s) == (12.0, 36.0)


def test_a_result_brings_its_forecast_and_can_be_asked_again() -> None:
    config = tiny(strategies="diloco", network={"nodes": [{"step_s": 1.0, "up_bps": 64.0}]})
    (spec,) = plan(config)
    result = run_stacked(experiment_of(config, spec, registry.data_of(config)))
    # Three rounds of 16 bytes, 2 s each.
    assert result.simulated.elapsed_s == 12 + 6
    assert forecast(result, NetworkModel(nodes=[NodeProfile(step_s=2.0)])).elapsed_s == 24
    relative = forecast(result, NetworkModel(nodes=[NodeProfile(speed=0.5)]), measured_s=3.0)
    assert relative.elapsed_s == 72
    assert forecast(result, NetworkModel()).elapsed_s > 0  # as fast as this machine


def test_failures_are_in_the_forecast(tmp_path: Path) -> None:
    events = [
        {"node": 1, "event": "dies", "step": 2, "in_round": True},
        {"node": 1, "event": "joins", "step": 5},
    ]
    network = {"nodes": [{"step_s": 1.0}], "heartbeat_timeout_s": 7}
    config = tiny(strategies="diloco", network=network, faults={"events": events})
    (report,) = run_sweep(config, tmp_path).reports
    assert config.network is not None
    simulated = report.forecast(config.network)
    # The round of step 3 fails, 8 node-steps with it; the node heals in that of step 7.
    assert simulated.elapsed_s == 12 + 7
    assert (simulated.lost.rounds, simulated.lost.node_steps, simulated.lost.heals) == (1, 8, 1)
    assert simulated.nodes[1].away_s == 4 + 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strategies": [{"name": "diloco", "options": {"outr": 1}}]}, "diloco has no option outr"),
        (
            {"strategies": [{"name": "diloco", "options": {"outer_optimizer": 3}}]},
            "write outer_optimizer: {name: sgd",
        ),
        ({"strategies": ["tests.helpers.sweeps:nothing"]}, "cannot be found"),
        ({"strategies": ["no_such_module:x"]}, "cannot be found: No module named 'no_such_module'"),
        ({"strategies": [f"{HERE}:not_a_strategy"], "optimizer": "sgd"}, "no option optim_spec"),
        ({"strategies": [f"{HERE}:TINY"]}, "is a dict, and not callable"),
        ({"optimizer": "adm"}, "optimizer='adm': it must be one of adam, adamw"),
        ({"model_options": {"wdth": 2}}, "has no option wdth: it takes width"),
        ({"model_options": {"width": [2, 4]}}, r"width=\[2, 4\]: options are not swept"),
        ({"optimizer_options": {"weight_decay": [0.1]}}, "weight_decay: a list in the place of"),
        ({"data": f"{HERE}:bad_pair"}, "must return a pair of data sets"),
        ({"data": "absent.txt"}, "cannot read absent.txt: .*; check --data"),
        ({"data": None}, "say what tests.helpers.sweeps:Line learns from"),
        ({"batch_size": 500}, "batch_size=500 is more than the 32 samples"),
        ({"device": "cuda:77"}, "device='cuda:77'"),
        ({"faults": {"events": [{"node": 5, "event": "dies", "step": 1}]}}, "nodes are 0 to 1"),
        (
            {
                "network": {},
                "faults": {"events": [{"node": 1, "event": "dies", "time_s": 1}]},
            },
            "give pace_s",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        run_sweep(tiny(**change), tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", sorted(config.STRATEGIES))
def test_every_named_strategy_runs(name: str, tmp_path: Path) -> None:
    # The model has two parameters, which make two fragments.
    entry = {"name": name, "options": {"fragments": 2} if name == "streaming" else {}}
    config = tiny(strategies=[entry], schedule="cosine", warmup_steps=2, max_norm=1.0)
    (report,) = run_sweep(config, tmp_path).reports
    assert report.rounds
    assert report.final_lr < config.lr[0]


def test_a_codec_is_an_option_and_makes_a_run_send_less(tmp_path: Path) -> None:
    entries = [
        {"name": "diloco", "label": codec or "plain", "options": {"codec": codec}}
        for codec in (None, "int8", "int4")
    ]
    plain, int8, int4 = run_sweep(tiny(strategies=entries), tmp_path).reports
    assert int4.bytes_per_node < int8.bytes_per_node < plain.bytes_per_node
    assert len(plain.rounds) == len(int8.rounds) == len(int4.rounds)


def test_the_names_of_the_configuration_are_those_of_the_catalogue() -> None:
    assert {name.partition(":")[2] for name in config.STRATEGIES.values()} <= set(
        strategies.__all__
    )
    assert tuple(models.MODELS) == config.MODELS
    assert set(registry.DATA_OF) == set(config.MODELS)


def test_options_reach_the_optimizers() -> None:
    entry = StrategyConfig(
        name="diloco",
        options={"optim": {"name": "sgd", "lr": 0.5}, "outer_optimizer": {"lr": 0.25}},
    )
    made = registry.strategy_of(SimulateConfig(), entry, sync_every=7, lr=0.1)
    assert made.inner is not None
    assert made.inner.optim.kwargs == {"lr": 0.5}
    assert made.config()["H"] == 7


MODELS = {
    "mlp": (torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 2])),
    "cnn": (torch.zeros(3, 1, 28, 28), torch.tensor([0, 1, 2])),
    "gpt": torch.zeros(3, 65, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_takes_its_batch_and_returns_its_loss(name: str) -> None:
    loss = registry.model_of(SimulateConfig(model=name))()(MODELS[name])
    assert loss.shape == ()
    loss.backward()


def test_text_is_cut_into_rows_that_overlap_by_one_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(100)) * 2)
    train, held_out = text([path], context=8)
    assert train[0].tolist() == list(range(9))
    assert train[1].tolist() == list(range(8, 17))
    assert len(train) == (180 - 1) // 8
    assert held_out[0].tolist() == list(range(80, 89))


@pytest.mark.parametrize("model", sorted(DATA_OF))
def test_a_model_takes_batches_of_the_data_that_it_learns_by_default(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old failing that must not come back: the gpt got its rows in a list, and broke off."""
    monkeypatch.setattr(datasets, "digits", partial(datasets.digits, 32, 16))
    config = SimulateConfig(model=model)
    train, held_out = registry.data_of(config)
    made = registry.model_of(config)()
    for data in (train, held_out):
        batch = Feed(data, num_nodes=2, batch_size=3).batch(1, 0)
        assert made(batch).isfinite()


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    with pytest.raises(SettingsError, match="is too short: 3 bytes, and one row needs 65"):
        text([tmp_path / "a.txt"])


def test_digits_are_the_same_each_time_and_held_out_ones_apart() -> None:
    pytest.importorskip("sklearn")
    train, held_out = digits(train=50, held_out=20)
    again, _ = digits(train=50, held_out=20)
    assert train.tensors[0].shape == (50, 1, 28, 28)
    assert torch.equal(train.tensors[0], again.tensors[0])
    assert len(held_out) == 20
    assert set(train.tensors[1].tolist()) <= set(range(10))


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SettingsError, match=r"install torchft\[simulate\], or use --model gpt"):
        digits()


def test_one_run_needs_no_folder() -> None:
    config = tiny(strategies="diloco")
    report = run_one(config, plan(config)[0], registry.data_of(config))
    assert report.final_loss > 0
