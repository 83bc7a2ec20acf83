"""Tables and pictures of a sweep, from reports that are written by hand."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from torchft.experiments.config import (
    SimulateConfig,
    StrategyConfig,
    from_mapping,
    read_config,
)
from torchft.experiments.machine import describe_machine
from torchft.experiments.plots import lines_of, write_plots
from torchft.experiments.runs import RunReport, RunSpec
from torchft.experiments.sweep import Sweep
from torchft.experiments.tables import as_csv, as_table, rows_of, target_of, write_tables
from torchft.peers import Place
from torchft.simulator.events import Dies
from torchft.simulator.round_records import RoundRecord

STEPS = 20
ONE_SECOND = {"nodes": [{"step_s": 1.0}]}


def report(
    name: str = "diloco",
    *,
    seed: int = 0,
    nodes: int = 2,
    sync_every: int | None = 5,
    lr: float = 0.1,
    start: float = 20.0,
    nbytes: int = 500_000,
    deaths: tuple[Dies, ...] = (),
) -> RunReport:
    """Its training loss falls by 1 in each step, from `start`; it validates as 3 + seed."""
    members = tuple(range(nodes))
    rounds = [
        RoundRecord(
            step=step,
            place=Place.AFTER,
            kind="average",
            members=members,
            counted=members,
            committed=True,
            bytes_per_node=dict.fromkeys(members, nbytes),
        )
        for step in range((sync_every or 1) - 1, STEPS, sync_every or 1)
    ]
    spec = RunSpec(
        strategy=StrategyConfig(name=name),
        nodes=nodes,
        sync_every=sync_every,
        lr=lr,
        seed=seed,
        steps=STEPS,
    )
    return RunReport(
        spec=spec,
        parameters=7,
        losses=[dict.fromkeys(members, start - step) for step in range(STEPS)],
        validations=[(0, 30.0), (10, 8.0 + seed), (STEPS, 3.0 + seed)],
        rounds=rounds,
        heals=[],
        deaths=list(deaths),
        final_lr=lr,
        train_s=2.0,
        cpu_s=1.0,
    )


def sweep(*reports: RunReport, **settings: Any) -> Sweep:
    config = from_mapping({"network": ONE_SECOND, **settings})
    return Sweep(config, list(reports), [], skipped=0)


def test_seeds_are_one_row_with_their_spread() -> None:
    (row,) = rows_of(sweep(*(report(seed=seed) for seed in (0, 1, 2))))
    assert (row.seeds, row.loss.mean, row.loss.spread) == (3, 4.0, 1.0)
    assert str(row.loss) == "4 ± 1"
    assert (row.steps_per_s.mean, row.megabytes.mean) == (10.0, 2.0)


def test_one_seed_has_no_spread() -> None:
    (row,) = rows_of(sweep(report()))
    assert str(row.loss) == "3"


def test_each_combination_is_a_row() -> None:
    reports = [report(), report(nodes=3), report(sync_every=10), report(lr=0.2), report("fedavg")]
    assert len(rows_of(sweep(*reports))) == 5


def test_time_is_measured_to_what_every_run_reached() -> None:
    found = sweep(report(), report("fedavg", start=24.0))
    # The last ten losses of the second are 14 … 5.
    assert target_of(found) == 9.5
    times = [row.networks["network"].to_loss_s for row in rows_of(found)]
    # The first has 14 … 5 in the steps that end at 7 … 16 s.
    assert [time.mean for time in times if time] == [16.0, 20.0]


def test_or_to_what_is_asked_for_which_some_never_reach() -> None:
    found = sweep(report(), report("fedavg", start=24.0), target_loss=6.0)
    rows = rows_of(found)
    assert [row.networks["network"].to_loss_s is None for row in rows] == [False, True]
    assert "never" in as_table(rows, target_of(found))


def test_the_table_is_aligned_and_says_what_was_lost_only_if_something_was() -> None:
    quiet = as_table(rows_of(sweep(report(), report("all_reduce", sync_every=None))), 6.0)
    lines = quiet.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[1] == "strategy"
    assert "s to loss 6" in lines[0]
    assert "lost" not in quiet
    stormy = as_table(rows_of(sweep(report(deaths=(Dies(1, 3),)))), 6.0)
    assert "lost node-steps" in stormy
    assert stormy.splitlines()[2].split("|")[-2].strip() == "3"


def test_each_network_has_its_columns() -> None:
    slow = {"nodes": [{"step_s": 1.0, "up_bps": 4e6}]}
    found = sweep(report(), networks={"dsl": slow})
    (row,) = rows_of(found)
    # Four rounds of half a megabyte, a second each.
    assert {name: one.elapsed_s.mean for name, one in row.networks.items()} == {
        "network": 20.0,
        "dsl": 24.0,
    }
    assert "s to loss 5.5 (dsl)" in as_table([row], target_of(found))


def test_csv_has_every_figure() -> None:
    rows = rows_of(sweep(report(), report(seed=1), report("all_reduce", sync_every=None)))
    first, second = csv.DictReader(io.StringIO(as_csv(rows)))
    assert (first["strategy"], first["sync_every"], first["loss"]) == ("diloco", "5", "3.5")
    assert (second["strategy"], second["sync_every"], second["loss_spread"]) == (
        "all_reduce",
        "",
        "",
    )
    assert float(first["network_utilisation"]) == 1.0


def test_without_a_run_there_are_no_rows() -> None:
    assert rows_of(sweep()) == []
    assert as_csv([]) == "strategy\r\n"


def test_the_folder_tells_how_it_was_made(tmp_path: Path) -> None:
    found = sweep(report(), seeds=[0, 5])
    write_tables(found, rows_of(found), tmp_path)
    assert from_mapping(read_config(tmp_path / "config.yaml")) == found.config
    assert from_mapping(read_config(tmp_path / "difference.yaml")) == found.config
    assert "model" not in read_config(tmp_path / "difference.yaml")
    machine, _, table = (tmp_path / "table.md").read_text().partition("\n\n")
    assert machine == describe_machine("cpu") and f"torch {torch.__version__}" in machine
    assert table.startswith("| strategy")


def test_a_line_is_the_mean_of_the_seeds_between_the_lowest_and_the_highest() -> None:
    found = sweep(report(), report(seed=1, start=22.0))
    (line,) = lines_of(found, lambda one: range(1, STEPS + 1))
    assert line.x == [float(step) for step in range(10, STEPS + 1)]
    assert (line.lowest[0], line.loss[0], line.highest[0]) == (15.5, 16.5, 17.5)
    assert line.looks == [(10.0, 8.5), (20.0, 3.5)]
    assert all(map(math.isfinite, line.loss))


def test_a_label_says_what_tells_a_line_from_the_others() -> None:
    def labels(*reports: RunReport) -> list[str]:
        return [line.label for line in lines_of(sweep(*reports), lambda one: range(STEPS))]

    assert labels(report(), report("fedavg")) == ["diloco", "fedavg"]
    assert labels(report(), report(nodes=3, sync_every=10, lr=0.2)) == [
        "diloco, 2 nodes, every 5, lr 0.1",
        "diloco, 3 nodes, every 10, lr 0.2",
    ]
    assert labels(report(), report("all_reduce", sync_every=None)) == ["diloco", "all_reduce"]


def test_pictures_are_drawn_against_steps_bytes_and_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = sweep(report(), report("all_reduce", sync_every=None), networks={"lan": ONE_SECOND})
    written = write_plots(found, tmp_path)
    assert [path.name for path in written] == [
        "loss_by_steps.png",
        "loss_by_bytes.png",
        "loss_by_time.png",
        "loss_by_time_lan.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_of_nothing_there_is_no_picture(tmp_path: Path) -> None:
    assert write_plots(sweep(), tmp_path) == []


def test_bytes_alone_can_be_zero(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    alone = report(nodes=1, nbytes=0)
    assert len(write_plots(sweep(alone), tmp_path)) == 3


def test_without_a_network_there_is_no_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = Sweep(SimulateConfig(network=None), [report()], [], skipped=0)
    assert [path.name for path in write_plots(found, tmp_path)] == [
        "loss_by_steps.png",
        "loss_by_bytes.png",
    ]
    assert "to loss" not in as_table(rows_of(found), target_of(found))
