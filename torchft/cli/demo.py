"""`torchft demo`: replica groups train, one is killed, one heals."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchft.arguments import above_zero, at_least
from torchft.cli import report
from torchft.cli.parser import given
from torchft.demo.options import CODECS, DEFAULT_STEPS, STRATEGIES, DemoOptions

__all__ = ["add_command"]

ABOUT = """\
Replica groups train a small byte-level transformer, each under a torchrun of its own, and share a
lighthouse inside this command. In the middle of the run every process of one group is killed; the
others go on; the group is started again and heals from them. At the end all hold the same weights.

The exit code is 0 only if every group ended by itself and all digests are equal; 128 + n after
signal n.
"""

EXAMPLES = """\
examples:
  torchft demo                                   3 groups, DDP, one kill
  torchft demo --strategy diloco --seed 7        another strategy, another moment and victim
  torchft demo --strategy streaming              averages in flight when the group is killed
  torchft demo --codec int8                      gradients of a quarter of the bytes
  torchft demo --replicas 2 --workers-per-replica 2
  torchft demo --no-kill --keep runs/quiet       keep logs and step records
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` to the commands of `torchft`."""
    parser = commands.add_parser(
        "demo",
        help="train in replica groups here, kill one, see it heal",
        description=ABOUT,
        epilog=EXAMPLES,
    )
    parser.set_defaults(run=run)
    _add_run_flags(parser)
    _add_kill_flags(parser)
    report.add_json_flag(parser)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    steps = ", ".join(f"{steps} for {name}" for name, steps in DEFAULT_STEPS.items())
    add = parser.add_argument
    add("--replicas", type=at_least(1), metavar="N", help="replica groups (3)")
    add(
        "--workers-per-replica",
        dest="workers",
        type=at_least(1),
        metavar="N",
        help="ranks in each group, which average their gradients among themselves (1)",
    )
    add(
        "--strategy",
        choices=STRATEGIES,
        help="what the groups exchange: gradients in each step (ddp), weights (local_sgd) or an "
        "outer step (diloco) every few steps, or the outer steps of fragments while training goes "
        "on (streaming)",
    )
    add(
        "--codec",
        choices=CODECS,
        help="send less: numbers travel as this encodes them; diloco and streaming feed back what "
        "it loses (as they are)",
    )
    add(
        "--steps",
        type=at_least(1),
        metavar="N",
        help=f"steps to commit, more if a group is still away then ({steps})",
    )
    add(
        "--sync-every",
        type=at_least(1),
        metavar="N",
        help="all but ddp: inner steps in one step (5)",
    )
    add(
        "--corpus",
        type=Path,
        action="append",
        metavar="PATH",
        help="text to learn, a file or a folder; may be repeated (the standard library's sources)",
    )
    add("--keep", type=Path, metavar="FOLDER", help="a new folder for logs and step records")
    add(
        "--timeout",
        dest="timeout_s",
        type=above_zero,
        metavar="SECONDS",
        help="give up a run that is not over by then (300)",
    )


def _add_kill_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--no-kill", dest="kill", action="store_false", help="let everybody live")
    add(
        "--seed",
        type=at_least(0),
        metavar="N",
        help="decides weights, batches, who is killed and when (taken from the clock, and printed)",
    )
    add(
        "--heartbeat-timeout-ms",
        type=at_least(300),
        metavar="MS",
        help="silence after which a group counts as dead (1500)",
    )


def run(typed: argparse.Namespace) -> int:
    """Do what was typed; returns the exit code."""
    from torchft.demo.group_demo import run_demo

    return report.show(run_demo(options_of(typed), report.view_for(typed)), as_json=typed.json)


def options_of(typed: argparse.Namespace) -> DemoOptions:
    """What was typed means this. Raises SettingsError for what does not go together."""
    corpus = tuple(typed.corpus or ())
    return DemoOptions(**{"seed": new_seed(), **given(typed, DemoOptions), "corpus": corpus})


def new_seed() -> int:
    """Another one each time; small enough to be typed again."""
    import secrets

    return secrets.randbelow(10_000)
