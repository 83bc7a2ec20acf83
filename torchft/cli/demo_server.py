"""`torchft demo-server`: workers of a parameter server come and go, and it is killed itself."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from torchft.arguments import CODECS, above_zero, at_least
from torchft.cli import report
from torchft.cli.parser import given

__all__ = ["add_command"]

ABOUT = """\
A parameter server and two workers train a small model, as processes of their own. One worker is
killed; another joins; the server is killed, the workers train on, and it is started again. At
the end the survivors' weights and the server's are compared.

The exit code is 0 only if all of this happened, nothing that had been counted was lost, and the
weights are equal bit for bit; 128 + n after signal n.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo-server` to the commands of `torchft`."""
    parser = commands.add_parser(
        "demo-server",
        help="train through a parameter server here, kill a worker and the server",
        description=ABOUT,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--sync-every", type=at_least(1), metavar="H", help="steps of a round (10)")
    add(
        "--codec",
        choices=CODECS,
        help="how numbers travel (bf16)",
    )
    add(
        "--grace",
        dest="grace_s",
        type=above_zero,
        metavar="SECONDS",
        help="of a silent worker (3)",
    )
    add("--keep", type=Path, metavar="FOLDER", help="a new folder for logs and checkpoints")
    add(
        "--train",
        type=shlex.split,
        metavar="COMMAND",
        help="what the workers run (a byte-level model, with torch alone)",
    )
    add(
        "--timeout",
        dest="timeout_s",
        type=above_zero,
        metavar="SECONDS",
        help="give up a run that is not over by then (900)",
    )
    report.add_json_flag(parser)


def run(typed: argparse.Namespace) -> int:
    """Do what was typed; returns the exit code."""
    import shutil

    from torchft.demo.server_demo import run_server_demo
    from torchft.demo.server_options import ServerDemoOptions
    from torchft.launch.folder import run_folder

    folder = run_folder(typed.keep, "torchft_demo_server_")
    options = ServerDemoOptions(**{**given(typed, ServerDemoOptions), "folder": folder})
    summary = run_server_demo(options, report.view_for(typed))
    if typed.keep is None and summary.good:
        shutil.rmtree(options.folder)
    return report.show(summary, as_json=typed.json)
