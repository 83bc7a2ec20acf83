"""`torchft completion`: a script that lets a shell complete commands and flags."""

from __future__ import annotations

import argparse
from functools import partial

from torchft.errors import TorchftError

__all__ = ["add_command"]

ABOUT = """\
Prints a completion script for a shell. To use it in every new shell:

  torchft completion bash > ~/.local/share/bash-completion/completions/torchft
  torchft completion zsh > ~/.zfunc/_torchft      # with ~/.zfunc on the fpath
"""

SHELLS = ("bash", "zsh", "tcsh")


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], top: argparse.ArgumentParser
) -> None:
    """Add `completion` to the `commands` of `top`, whose words it completes."""
    parser = commands.add_parser(
        "completion",
        help="print a completion script for bash, zsh or tcsh",
        description=ABOUT,
    )
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(run=partial(run, top))


def run(top: argparse.ArgumentParser, typed: argparse.Namespace) -> int:
    """Print the completion script of a shell; returns the exit code.

    Raises:
        TorchftError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise TorchftError(
            "completion scripts are made by shtab, which is not installed: "
            "pip install 'torchft[completion]'"
        ) from None
    print(shtab.complete(top, shell=typed.shell))
    return 0
