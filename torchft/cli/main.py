"""`torchft`: the commands for people.

Exit codes: 0 all is well, 1 the command ran and what it looked at is not well, 2 wrong usage or a
setting that cannot be used, 128 + n after signal n.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchft.cli import completion, demo, demo_server, diloco, doctor, simulate
from torchft.cli.parser import run_command, top_parser

__all__ = ["main", "parser"]

ABOUT = """\
Fault-tolerant training of PyTorch models in replica groups: groups fail, the others go on, and a
group that comes back heals from them. `torchft_lighthouse --help` is about the coordinator.

Exit codes: 0 all is well; 1 it ran, and what it looked at is not well; 2 wrong usage or a setting
that cannot be used; 128 + n after signal n.
"""


def parser() -> argparse.ArgumentParser:
    """The argument parser of the whole `torchft` command."""
    top, commands = top_parser("torchft", ABOUT)
    completion.add_command(commands, top)
    demo.add_command(commands)
    demo_server.add_command(commands)
    diloco.add_command(commands)
    doctor.add_command(commands)
    simulate.add_command(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments`, or on the command line; returns the exit code."""
    return run_command(parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
