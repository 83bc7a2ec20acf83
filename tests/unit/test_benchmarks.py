"""What the benchmarks make of their figures: goals, tables, and which of them run unless named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

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
    settings = STRATEGIES["streaming"](Options(sync_every=20), "int8").config()
    assert (settings["H"], settings["fragments"], settings["codec"]) == (20, 4, "int8")
    assert (settings["delay"], settings["mix"]) == (5, 0.5)


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
