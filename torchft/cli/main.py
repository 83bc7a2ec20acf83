"""`torchft`: the commands for people. Exit codes: 0 good, 1 not good, 2 wrong usage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from torchft.cli import demo, demo_server, diloco, doctor, simulate
from torchft.errors import TorchftError

__all__ = ["main", "parser"]

ABOUT = """\
Fault-tolerant training of PyTorch models in replica groups: groups fail, the others go on, and a
group that comes back heals from them. `torchft_lighthouse --help` is about the coordinator.
"""


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    top = argparse.ArgumentParser(
        prog="torchft",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"torchft {version()}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_command(commands)
    demo_server.add_command(commands)
    diloco.add_command(commands)
    doctor.add_command(commands)
    simulate.add_command(commands)
    return top


def version() -> str:
    """Of the installed package."""
    try:
        return metadata.version("torchft")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments`, or on the command line; returns the exit code."""
    typed = parser().parse_args(arguments)
    try:
        return int(typed.run(typed))
    except TorchftError as error:
        print(f"torchft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
