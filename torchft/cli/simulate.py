"""`torchft simulate`: compare strategies, on this machine, before they ship."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchft.arguments import at_least
from torchft.cli.parser import given
from torchft.errors import SettingsError
from torchft.experiments.config import (
    MODELS,
    STRATEGIES,
    SimulateConfig,
    difference,
    from_mapping,
    needed,
    read_config,
    read_part,
    renamed_settings,
)
from torchft.experiments.folders import check_folder

if TYPE_CHECKING:
    from torchft.experiments.runs import RunReport
    from torchft.experiments.sweep import Failure, Sweep

__all__ = ["add_command"]

ABOUT = """\
Train a model on simulated nodes by several strategies, and compare loss, bytes and simulated time.
All nodes live in one process; the strategies are the ones that real replica groups run. Flags with
several values are swept: every combination is a run, with each seed. Runs that have ended are kept
in --out, and only what is missing is run again.

The exit code is 0 if every run ended, 1 if one failed, 2 for wrong usage.
"""

EXAMPLES = f"""\
strategies: {", ".join(STRATEGIES)}

examples:
  torchft simulate                               three strategies, 4 nodes: half a minute
  torchft simulate --strategies diloco fedavg --nodes 2 4 8 --sync-every 10 50 --seeds 0 1 --jobs 2
  torchft simulate sweep.yaml --steps 1000       a file, and flags over it
  torchft simulate --network dsl.yaml            another network: nothing is trained again
  torchft simulate --model gpt --data my_texts/ --set optimizer=sgd --set max_norm=1.0
  torchft simulate sweep.yaml --dry-run          what would run, and what is not by default

A file (YAML or TOML) has the names of the flags: `nodes: [2, 4]`. --set takes every other name, see
torchft.experiments.config.SimulateConfig. Examples are in examples/simulate/.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate` to the commands of `torchft`."""
    parser = commands.add_parser(
        "simulate",
        help="compare strategies on simulated nodes: loss, bytes, time",
        description=ABOUT,
        epilog=EXAMPLES,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG", help="settings, YAML or TOML; goes first"
    )
    _add_swept_flags(parser.add_argument_group("swept, one or more of each"))
    _add_setting_flags(parser.add_argument_group("settings"))
    _add_run_flags(parser.add_argument_group("the sweep itself"))


def _add_swept_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--strategies", nargs="+", metavar="NAME", help="see below (all_reduce fedavg diloco)")
    add("--nodes", nargs="+", type=at_least(1), metavar="N", help="simulated nodes (4)")
    add("--sync-every", nargs="+", type=at_least(1), metavar="H", help="steps between rounds (20)")
    add("--every", nargs="+", type=at_least(1), help=argparse.SUPPRESS)  # of an earlier release
    add("--lr", nargs="+", type=float, metavar="RATE", help="inner learning rate (0.001)")
    add("--seeds", nargs="+", type=at_least(0), metavar="S", help="weights, order, masks (0)")


def _add_setting_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)}, or package.module:factory (mlp)")
    add("--data", metavar="NAME", help="digits, stdlib-text, a path to text, or a factory")
    add("--steps", type=at_least(1), metavar="N", help="inner steps of each node (300)")
    add("--batch-size", type=at_least(1), metavar="N", help="samples of each node's step (64)")
    add(
        "--equal",
        choices=("tokens", "steps"),
        help="what runs with different nodes have in common; tokens: with twice the nodes half "
        "the steps (tokens)",
    )
    add("--schedule", choices=("constant", "cosine"), help="of the learning rate (constant)")
    add("--network", type=Path, metavar="FILE", help="speeds and links of the nodes")
    add("--faults", type=Path, metavar="FILE", help="failures and joins of nodes")
    add("--weather", type=Path, help=argparse.SUPPRESS)  # both of them, of an earlier release
    add("--target-loss", type=float, metavar="LOSS", help="time is measured to it (all reached it)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (cpu)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other setting, its value as YAML; may be repeated",
    )


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--out",
        type=Path,
        default=Path("runs/simulate"),
        metavar="FOLDER",
        help="for runs, table and plots (runs/simulate)",
    )
    add("--jobs", type=at_least(1), default=1, metavar="N", help="runs at a time (1)")
    add("--dry-run", action="store_true", help="check, say what would run, and run nothing")
    add("--json", action="store_true", help="print figures as JSON instead of a table")


def run(typed: argparse.Namespace) -> int:
    """Do what was typed; returns the exit code."""
    config = config_of(typed)
    check_folder("--out", typed.out / "runs")
    needed("matplotlib")  # sooner than after an hour
    # Factories of the user's are looked for where the command is typed, as `python -m` does.
    sys.path.insert(0, str(Path.cwd()))
    if typed.dry_run:
        return _say_plan(config, typed)
    return _sweep(config, typed)


def config_of(typed: argparse.Namespace) -> SimulateConfig:
    """The file, and the flags over it.

    Raises:
        SettingsError: something that there is not, or cannot be.
    """
    said = given(typed, SimulateConfig) | dict(_setting(one) for one in typed.set)
    if typed.every is not None:
        said["every"] = typed.every
    for name in ("network", "faults", "weather"):
        if (path := getattr(typed, name)) is not None:
            said[name] = read_part(path)
    source = "the flags" if typed.config is None else f"{typed.config} with the flags"
    file = {} if typed.config is None else read_config(typed.config)
    return from_mapping(renamed_settings(file) | renamed_settings(said), source=source)


def _setting(typed: str) -> tuple[str, Any]:
    name, equals, value = typed.partition("=")
    if not equals:
        raise SettingsError(f"--set {typed}: write it as NAME=VALUE")
    yaml = needed("yaml")
    try:
        return name.strip().replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {typed}: the value is no YAML: {error}") from error


def _say_plan(config: SimulateConfig, typed: argparse.Namespace) -> int:
    from torchft.experiments.registry import data_of
    from torchft.experiments.sweep import check_runs, files, plan
    from torchft.experiments.tables import as_yaml

    specs = plan(config)
    check_runs(config, specs, data_of(config))
    runs = [
        {"run": str(spec), "steps": spec.steps, "done": path.exists()}
        for spec, path in files(config, specs, typed.out).items()
    ]
    if typed.json:
        print(json.dumps({"difference": difference(config), "runs": runs}))
        return 0
    for one in runs:
        print(f"{one['run']}: {one['steps']} steps{', done already' if one['done'] else ''}")
    print(f"\n{len(runs)} runs. Not by default:\n{as_yaml(difference(config))}", end="")
    return 0


def _sweep(config: SimulateConfig, typed: argparse.Namespace) -> int:
    from torchft.experiments.plots import write_plots
    from torchft.experiments.sweep import plan, run_sweep
    from torchft.experiments.tables import rows_of, write_tables

    with _Telling(sum(spec.steps for spec in plan(config))) as telling:
        try:
            sweep = run_sweep(
                config, typed.out, jobs=typed.jobs, on_step=telling.steps, on_run=telling.ended
            )
        except KeyboardInterrupt:
            telling.say(f"stopped; what has ended is in {typed.out}: the same command goes on")
            raise
    write_tables(sweep, rows_of(sweep), typed.out)
    write_plots(sweep, typed.out)
    _say(sweep, typed)
    return 1 if sweep.failures else 0


def _say(sweep: Sweep, typed: argparse.Namespace) -> None:
    from torchft.experiments.tables import rows_of, target_of, with_machine

    rows, target = rows_of(sweep), target_of(sweep)
    if typed.json:
        failures = [{"run": str(one.spec), "error": one.error} for one in sweep.failures]
        found = {
            "out": str(typed.out),
            "target_loss": target,
            "rows": [row.plain() for row in rows],
            "failures": failures,
            "skipped": sweep.skipped,
        }
        print(json.dumps(found))
        return
    if rows:
        print(f"\n{with_machine(sweep, rows)}\n")
    ended = len(sweep.reports)
    earlier = f", {sweep.skipped} of them earlier" if sweep.skipped else ""
    failed = f", {len(sweep.failures)} failed" if sweep.failures else ""
    print(f"{ended} runs ended{earlier}{failed}. Table, plots and runs are in {typed.out}")


class _Telling:
    """On standard error: a bar on a terminal, and a line for each run."""

    def __init__(self, steps: int) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        self._bar = tqdm(total=steps, unit="step", disable=None, dynamic_ncols=True)

    def __enter__(self) -> _Telling:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def steps(self, done: int) -> None:
        """So many more are done."""
        self._bar.update(done)

    def ended(self, run: RunReport | Failure) -> None:
        """A run is over."""
        from torchft.experiments.sweep import Failure

        if isinstance(run, Failure):
            self.say(f"failed: {run.spec}: {run.error}")
        else:
            self.say(f"{run.spec}: loss {run.final_loss:.4g} after {run.train_s:.1f} s")

    def say(self, line: str) -> None:
        """Write a line above the progress bar."""
        self._bar.write(line, file=sys.stderr)
