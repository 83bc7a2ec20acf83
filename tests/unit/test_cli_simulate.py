"""`torchft simulate`: what it takes, what it prints, and how it ends."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sweeps import TINY
from torchft.cli import simulate
from torchft.cli.main import main, parser
from torchft.experiments.config import SimulateConfig, StrategyConfig, from_mapping
from torchft.experiments.tables import as_yaml
from torchft.simulator.faults import FaultSchedule
from torchft.simulator.network import NetworkModel, NodeProfile


@pytest.fixture(autouse=True)
def _same_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A configuration file of runs that end at once."""
    path = tmp_path / "tiny.yaml"
    path.write_text(as_yaml(TINY))
    return path


def config(*typed: str) -> SimulateConfig:
    return simulate.config_of(parser().parse_args(["simulate", *typed]))


def ran(capsys: pytest.CaptureFixture[str], *typed: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code = main(["simulate", *map(str, typed)])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_without_flags_it_is_the_default() -> None:
    assert config() == SimulateConfig()


def test_every_flag_reaches_its_setting(tmp_path: Path) -> None:
    network = tmp_path / "w.yaml"
    network.write_text("nodes: [{step_s: 2}]")
    asked = config(
        *("--strategies", "diloco", "demo", "--nodes", "2", "4", "--sync-every", "5", "10"),
        *("--lr", "0.1", "0.2", "--seeds", "0", "7", "--model", "gpt", "--data", "stdlib-text"),
        *("--steps", "9", "--batch-size", "3", "--equal", "steps", "--schedule", "cosine"),
        *("--network", str(network), "--target-loss", "1.5", "--device", "cuda"),
        *("--set", "max-norm=1.0", "--set", "optimizer_options={weight_decay: 0.1}"),
    )
    assert asked == SimulateConfig(
        strategies=(StrategyConfig(name="diloco"), StrategyConfig(name="demo")),
        nodes=(2, 4),
        sync_every=(5, 10),
        lr=(0.1, 0.2),
        seeds=(0, 7),
        model="gpt",
        data="stdlib-text",
        steps=9,
        batch_size=3,
        equal="steps",
        schedule="cosine",
        network=NetworkModel(nodes=[NodeProfile(step_s=2.0)]),
        target_loss=1.5,
        device="cuda",
        max_norm=1.0,
        optimizer_options={"weight_decay": 0.1},
    )


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("nodes = [2, 4]\nsteps = 50\n")
    asked = config(str(path), "--nodes", "8")
    assert (asked.nodes, asked.steps) == ((8,), 50)


@pytest.mark.parametrize(
    ("file", "flag"),
    [("every", "--sync-every"), ("sync_every", "--every"), ("every", "--every")],
)
def test_a_flag_wins_over_the_file_whichever_has_the_old_name(
    tmp_path: Path, file: str, flag: str
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"{file}: [5]\n")
    with pytest.warns(FutureWarning, match="every is now sync_every"):
        assert config(str(path), flag, "10").sync_every == (10,)


def test_a_network_by_flag_wins_over_the_weather_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text("nodes: [{step_s: 2}]")
    path = tmp_path / "old.yaml"
    path.write_text("weather: {nodes: [{step_s: 1}], pace_s: 3.0}\n")
    with pytest.warns(FutureWarning, match="weather is now network and faults"):
        asked = config(str(path), "--network", str(tmp_path / "slow.yaml"))
    assert asked.network == NetworkModel(nodes=[NodeProfile(step_s=2.0)])
    assert asked.faults == FaultSchedule(pace_s=3.0)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--nodes", "0"], "--nodes: 0: it must be an integer, at least 1"),
        (["--nodes", "two"], "'two': it must be an integer, at least 1"),
        (["--sync-every", "0"], "--sync-every: 0: it must be an integer, at least 1"),
        (["--seeds", "-1"], "at least 0"),
        (["--jobs", "0"], "--jobs: 0: it must be an integer, at least 1"),
        (["--equal", "time"], "invalid choice: 'time'"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--strategies", "diloko"], "nothing is called 'diloko': did you mean diloco?"),
        (["--model", "mpl"], "did you mean mlp?"),
        (["--set", "steps"], "--set steps: write it as NAME=VALUE"),
        (["--set", "stepps=3"], "there is no setting stepps: did you mean steps?"),
        (["--set", "nodes=[1"], "the value is no YAML"),
        (["--network", "absent.yaml"], "cannot read absent.yaml"),
        (["absent.yaml"], "cannot read absent.yaml"),
        (["--node", "3"], "unrecognized arguments: --node"),
        (["--nodes", "64"], "would end after"),
        (["--every", "5", "--sync-every", "5"], "every is now sync_every, and both are given"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, typed: list[str], said: str
) -> None:
    many = ["--sync-every", "400"] if typed == ["--nodes", "64"] else []
    code, out, err = ran(capsys, *typed, *many, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_folder_that_cannot_be_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, more: tuple[str, ...]
) -> None:
    code, said, told = ran(capsys, tiny, "--out", tiny / "out", *more)
    assert (code, said) == (2, "")
    assert told.count("\n") == 1
    assert f"--out: {tiny / 'out' / 'runs'} cannot be a folder, because {tiny} is none" in told
    code, _, told = ran(capsys, tiny, "--out", "/proc/out", *more)
    assert code == 2 and told.count("\n") == 1 and "cannot be written" in told


def test_a_sweep_prints_a_table_and_leaves_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    out = tmp_path / "out"
    code, said, told = ran(capsys, tiny, "--seeds", "0", "1", "--out", out)
    assert code == 0
    assert "| diloco" in said
    assert f"4 runs ended. Table, plots and runs are in {out}" in said
    assert "diloco, 2 nodes, every 4, lr 0.001, seed 1: loss " in told
    assert {path.name for path in out.iterdir()} == {
        "runs",
        "table.md",
        "table.csv",
        "config.yaml",
        "difference.yaml",
        "loss_by_steps.png",
        "loss_by_bytes.png",
        "loss_by_time.png",
    }


def test_a_second_sweep_trains_nothing_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    assert ran(capsys, tiny, "--out", tmp_path)[0] == 0
    code, said, told = ran(capsys, tiny, "--out", tmp_path, "--target-loss", "100")
    assert code == 0
    assert "2 runs ended, 2 of them earlier" in said
    assert "s to loss 100" in said
    assert "loss " not in told


def test_an_old_name_in_a_file_is_shown_once_however_many_runs_there_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old = tmp_path / "old.yaml"
    diloco = {"name": "diloco", "options": {"outer": {"lr": 0.4}}}
    settings = {name: value for name, value in TINY.items() if name != "sync_every"}
    old.write_text(as_yaml({**settings, "every": [3], "strategies": [diloco], "seeds": [0, 1]}))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        code, *_ = ran(capsys, old, "--out", tmp_path / "out")
    assert code == 0
    assert [str(one.message) for one in shown if one.category is FutureWarning] == [
        "torchft simulate: every is now sync_every",
        "torchft simulate: diloco: outer is now outer_optimizer",
    ]


def test_json_is_all_that_is_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    code, said, _ = ran(capsys, tiny, "--json", "--out", tmp_path)
    found = json.loads(said)
    assert code == 0
    assert [row["strategy"] for row in found["rows"]] == ["all_reduce", "diloco"]
    assert (found["failures"], found["skipped"], found["out"]) == ([], 0, str(tmp_path))
    assert found["rows"][1]["network_utilisation"] > 0


def test_a_run_that_fails_is_told_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    names = ["tests.helpers.sweeps:noisy", "all_reduce"]
    code, said, told = ran(capsys, tiny, "--strategies", *names, "--out", tmp_path)
    assert code == 1
    assert "1 runs ended, 1 failed" in said
    assert "failed: tests.helpers.sweeps:noisy, 2 nodes" in told
    assert "loss of node 0" in told


def test_when_all_fail_the_errors_are_all_there_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    code, said, _ = ran(
        capsys, tiny, "--strategies", "tests.helpers.sweeps:noisy", "--json", "--out", tmp_path
    )
    found = json.loads(said)
    assert code == 1
    assert (found["rows"], found["target_loss"], len(found["failures"])) == ([], None, 1)


def test_a_dry_run_says_what_would_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    out = tmp_path / "out"
    code, said, _ = ran(capsys, tiny, "--dry-run", "--out", out)
    assert code == 0
    assert "diloco, 2 nodes, every 4, lr 0.001, seed 0: 12 steps\n" in said
    assert "2 runs. Not by default:" in said
    assert "batch_size: 4" in said
    assert not out.exists()


def test_a_dry_run_knows_what_is_done(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path
) -> None:
    ran(capsys, tiny, "--strategies", "diloco", "--out", tmp_path)
    code, said, _ = ran(capsys, tiny, "--dry-run", "--json", "--out", tmp_path)
    assert code == 0
    plan = json.loads(said)
    assert [one["done"] for one in plan["runs"]] == [False, True]
    assert from_mapping(plan["difference"]) == from_mapping(TINY)


def test_ctrl_c_keeps_what_has_ended(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def pressed(self: object, run: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate._Telling, "ended", pressed)
    code, _, told = ran(capsys, tiny, "--out", tmp_path)
    assert code == 130
    assert "the same command goes on" in told
    monkeypatch.undo()
    assert "2 runs ended, 1 of them earlier" in ran(capsys, tiny, "--out", tmp_path)[1]


def test_a_factory_is_found_where_the_command_is_typed(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my_models_here.py").write_text("from tests.helpers.sweeps import Line as mine\n")
    monkeypatch.chdir(tmp_path)
    code, said, _ = ran(capsys, tiny, "--model", "my_models_here:mine", "--out", "out")
    assert code == 0
    assert "2 runs ended" in said


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = ran(capsys, "--help")
    assert code == 0
    words = ["examples:", "--strategies", "sparta_diloco", "--dry-run", "exit code is 0", "--set"]
    assert [word for word in words if word not in said] == []


def test_a_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, told = ran(capsys, "--out", tmp_path)
    assert code == 2
    assert "needs matplotlib, which is not installed" in told
    assert "install torchft[simulate]" in told
