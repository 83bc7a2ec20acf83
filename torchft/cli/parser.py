"""The argument parser of all commands: it suggests the word that was probably meant.

$ torchft dmeo
torchft: error: argument COMMAND: invalid choice: 'dmeo' (choose from …); did you mean 'demo'?
"""

from __future__ import annotations

import argparse
import difflib
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from torchft.errors import TorchftError
from torchft.version import UPSTREAM_API, __version__

__all__ = [
    "CommandParser",
    "given",
    "print_anywhere",
    "run_command",
    "top_parser",
    "with_suggestion",
]

_UNKNOWN = re.compile(r"invalid choice: '([^']*)'|unrecognized arguments: ([^\s=]+)")


class CommandParser(argparse.ArgumentParser):
    """argparse's, with a suggestion below an unknown command, flag or choice. Subcommands get the
    same class. Descriptions are printed as they stand, and flags have to be written out."""

    def __init__(self, **options: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"formatter_class": raw, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Print the usage and `message`, and exit with code 2."""
        super().error(with_suggestion(message, words_of(self)))


def with_suggestion(message: str, known: Iterable[str]) -> str:
    """`message` of argparse, with the nearest of the `known` words when it names an unknown one."""
    found = _UNKNOWN.search(message)
    if found is None:
        return message
    words = list(known)
    typed = found[1] or found[2] or ""
    if typed in words:
        return f"{message}: {typed} belongs to another command, or before this one"
    near = difflib.get_close_matches(typed, words, n=1, cutoff=0.7)
    return f"{message}; did you mean {near[0]!r}?" if near else message


def words_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All choices, commands and flags, but those of an earlier release, of a parser and the parsers
    below it."""
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from words_of(below)
        yield from map(str, action.choices or ())


def top_parser(
    prog: str, about: str
) -> tuple[argparse.ArgumentParser, argparse._SubParsersAction[argparse.ArgumentParser]]:
    """The parser of a whole command line, and where its commands are added. `--version` prints the
    version of this package and of the interface that it has."""
    parser: argparse.ArgumentParser = CommandParser(prog=prog, description=about)
    version = f"{prog} {__version__} (the interface of torchft {UPSTREAM_API})"
    parser.add_argument("--version", action="version", version=version)
    return parser, parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def given(typed: argparse.Namespace, options: type) -> dict[str, Any]:
    """The flags that were typed, or have a default, and are named as a field of the dataclass
    `options`, for its constructor."""
    values = {field.name: getattr(typed, field.name, None) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Run the command in `arguments`, None: on the command line; returns the exit code."""
    print_anywhere()
    typed = parser.parse_args(arguments)
    try:
        return int(typed.run(typed))
    except TorchftError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def print_anywhere() -> None:
    """Let what a locale cannot encode be printed as an escape, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
