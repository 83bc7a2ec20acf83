"""The benchmarks are commands: they explain themselves, refuse what they cannot do, and a tiny run
of each finds sane figures. What the figures are worth is not for a test to say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

from harness.figures import Figure, Floor, Result  # noqa: E402
from harness.goals import GOALS, Verdict, judge  # noqa: E402
from harness.show import as_lines, as_markdown  # noqa: E402
from run import BENCHMARKS  # noqa: E402

RESULT = Result(
    "a_benchmark",
    (
        Figure("commit.step", "a step", 0.45, "ms", Floor("heartbeat", 0.18)),
        Figure("commit.heartbeat", "a heartbeat", 0.21, "ms"),
        Figure("nothing.known", "a count", 3, ""),
    ),
    {"of": [1, 2]},
    {"cores": 2},
)


def ran(name: str, *flags: str, limit_s: float = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *flags]
    # Measured is the package beside the tests, whether or not it is installed.
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s)


@pytest.mark.parametrize("name", [*BENCHMARKS, "links", "run"])
def test_help_explains_and_measures_nothing(name: str) -> None:
    done = ran(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
    assert "--json" in done.stdout


def test_a_flag_out_of_range_is_refused() -> None:
    done = ran("commit_latency", "--groups", "1,0")
    assert done.returncode == 2
    assert "--groups" in done.stderr


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    done = ran("run", "speed")
    assert done.returncode == 2
    assert "'speed' is not one of startup" in done.stderr


LONG = {"recovery_time", "simulator_starts", "variants", "server", "server_faults"}
"""Even the least of a kill, a restart and a heal takes a while, and so do five starts of torch."""
LONG_S = 400
"""Theirs on a machine that others use too."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow, pytest.mark.timeout(LONG_S + 20)] if name in LONG else [],
        )
        for name in BENCHMARKS
    ],
)
def test_a_tiny_run_finds_sane_figures(name: str) -> None:
    done = ran(name, "--quick", "--json", limit_s=LONG_S if name in LONG else 100)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = Result.from_json(line)
    assert result.benchmark == name
    assert result.figures
    for figure in result.figures:
        assert math.isfinite(figure.value), figure
        assert figure.value >= 0 or figure.key.startswith(
            ("learning.gap.", "server_learning.gap.")
        ), figure
        assert figure.floor is None or figure.floor.value > 0, figure


def test_a_benchmark_that_fails_is_named_and_the_code_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run

    found = {"startup": None, "commit_latency": RESULT}
    monkeypatch.setattr(run, "_run", lambda name, flags: found[name])
    assert run.main(["startup", "commit_latency"]) == 1
    out, err = capsys.readouterr()
    assert "failed: startup" in err
    assert "| a step |" in out


def test_a_missed_goal_is_shown_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run

    monkeypatch.setattr(run, "_run", lambda name, flags: RESULT)
    assert run.main(["startup"]) == 0
    row = "| a heartbeat | 0.210 ms |  |  | ≤ 0.2 ms | missed |"
    assert row in capsys.readouterr().out.splitlines()


def test_a_goal_is_on_the_ratio_or_on_the_figure() -> None:
    step, heartbeat, unknown = RESULT.figures
    assert (judge(step), judge(heartbeat), judge(unknown)) == (
        Verdict.MET,
        Verdict.MISSED,
        Verdict.NONE,
    )
    assert GOALS["commit.step"].met_by(step)


def test_a_speed_is_held_to_the_least_it_may_be() -> None:
    slow, fast = (
        Figure("simulator.mlp.diloco", "speed", value, "node-steps/CPU s", Floor("plain", 100))
        for value in (119, 121)
    )
    assert (judge(slow), judge(fast)) == (Verdict.MISSED, Verdict.MET)
    assert "| ≥ 1.2 \N{MULTIPLICATION SIGN} | missed |" in as_markdown(
        [Result("of_speed", (slow,), {}, {})]
    )


def test_simulator_and_plain_loop_take_turns_of_equal_work() -> None:
    from harness.simulating import STRATEGIES, beside
    from harness.small_work import work

    mlp = work("mlp", images=256)
    speeds, result = beside(mlp, STRATEGIES["all_reduce"](mlp), nodes=2, steps=6, block=2)
    assert (len(speeds.ours_s), len(speeds.plain_s), speeds.node_steps) == (3, 3, 4)
    parameters = 235_146
    assert result.bytes_sent == [6 * 2 * (2 - 1) * parameters * 4 // 2] * 2


def test_a_goal_on_the_ratio_is_missed_without_a_floor() -> None:
    assert judge(Figure("commit.step", "a step", 0.1, "ms")) is Verdict.MISSED


def test_a_result_survives_its_json() -> None:
    line = RESULT.to_json()
    assert Result.from_json(line) == RESULT
    assert json.loads(line)["figures"][0]["ratio"] == pytest.approx(2.5)


def test_a_mean_stands_with_its_spread() -> None:
    mean = Figure("learning.diloco.int8", "loss", 2.3612, "nats", spread=0.00432)
    result = Result("of_means", (mean,), {}, {})
    assert "| loss | 2.36 ± 0.004 nats |  |  |  |  |" in as_markdown([result]).splitlines()
    assert Result.from_json(result.to_json()) == result


def test_a_gap_is_taken_seed_by_seed_and_a_quarter_of_h_is_the_delay() -> None:
    from harness.figures import gaps
    from learning import STRATEGIES, Options

    assert gaps([2.02, 1.96], [2.0, 2.0]) == pytest.approx([1.0, -2.0])
    settings = STRATEGIES["streaming"](Options(every=20), "int8").config()
    assert (settings["H"], settings["fragments"], settings["codec"]) == (20, 4, "int8")
    assert (settings["fragment_sync_delay"], settings["fragment_update_alpha"]) == (5, 0.5)


@pytest.mark.parametrize(
    ("codec", "least", "most"), [("fp32", 8.0, 8.02), ("int8", 2.0, 2.1), ("int4", 1.1, 1.2)]
)
def test_a_synchronisation_takes_so_many_bytes_of_the_wire(
    tmp_path: Path, codec: str, least: float, most: float
) -> None:
    from harness.serving import Wire, layers

    from torchft.parameter_server import DiLoCoWorker
    from torchft.parameter_server.core.options import ServerOptions
    from torchft.parameter_server.core.rules import Rules
    from torchft.parameter_server.server.server import DiLoCoServer

    model = layers(512, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DiLoCoServer(ServerOptions(tmp_path, Rules(1))) as server, Wire(server.port) as wire:
        address = f"127.0.0.1:{wire.port}"
        with DiLoCoWorker(model, optimizer, address, codec=codec, sync_every=1) as worker:
            before = wire.nbytes
            optimizer.step()
            counted = (wire.nbytes - before) / (2 * 512**2)
            assert worker.sync_count == 1
    assert least <= counted <= most


def test_what_takes_ten_minutes_runs_only_when_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import run

    ran: list[str] = []
    monkeypatch.setattr(run, "_run", lambda name, flags: ran.append(name) or RESULT)
    assert run.main([]) == 0
    assert set(BENCHMARKS) - set(ran) == set(run.LONG)
    ran.clear()
    assert run.main(["learning"]) == 0
    assert ran == ["learning"]


def test_tables_name_the_figure_the_floor_and_the_goal() -> None:
    row = "| a step | 0.450 ms | 0.180 (heartbeat) | 2.50 | ≤ 3 \N{MULTIPLICATION SIGN} | met |"
    assert row in as_markdown([RESULT]).splitlines()
    assert as_lines(RESULT).splitlines()[0] == "a_benchmark (cores 2)"
