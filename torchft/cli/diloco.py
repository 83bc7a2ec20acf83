"""`diloco server | worker | status`, also as `torchft diloco …`: a parameter server's commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchft.cli import diloco_server, diloco_status, diloco_worker
from torchft.cli.parser import run_command, top_parser

__all__ = ["add_command", "main"]

ABOUT = """\
DiLoCo with a parameter server, for workers that come and go.

Start a server, start any number of workers, look at the run.
docs/parameter_server.md describes all of it.
"""


def _fill(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    diloco_server.add_command(commands)
    diloco_worker.add_command(commands)
    diloco_status.add_command(commands)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `diloco` and its commands to those of `torchft`."""
    parser = commands.add_parser("diloco", help=ABOUT.splitlines()[0], description=ABOUT)
    _fill(parser.add_subparsers(title="commands", metavar="COMMAND", required=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `diloco` command; returns the exit code."""
    parser, commands = top_parser("diloco", ABOUT)
    _fill(commands)
    return run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
