"""`diloco server | worker | status`, also as `torchft diloco …`: a parameter server's commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchft.cli import diloco_server, diloco_status, diloco_worker
from torchft.cli.parser import CommandParser, print_anywhere, version_text
from torchft.errors import TorchftError

__all__ = ["add_command", "main"]

ABOUT = """\
DiLoCo with a parameter server, for workers that come and go: start a server, start any number of
workers, look at the run. docs/parameter_server.md describes all of it.
"""


def _fill(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    diloco_server.add_command(commands)
    diloco_worker.add_command(commands)
    diloco_status.add_command(commands)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `diloco` and its commands to those of `torchft`."""
    _fill(commands.add_parser("diloco", help=ABOUT.splitlines()[0], description=ABOUT))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `diloco` command; returns the exit code."""
    print_anywhere()
    parser = CommandParser(prog="diloco", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=version_text("diloco"))
    _fill(parser)
    typed = parser.parse_args(arguments)
    try:
        return int(typed.run(typed))
    except TorchftError as error:
        print(f"diloco: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
