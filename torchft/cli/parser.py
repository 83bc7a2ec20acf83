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
from collections.abc import Iterable, Iterator
from typing import NoReturn

from torchft.version import UPSTREAM_API, __version__

__all__ = ["CommandParser", "print_anywhere", "version_text", "with_suggestion"]

_UNKNOWN = re.compile(r"invalid choice: '([^']*)'|unrecognized arguments: ([^\s=]+)")


class CommandParser(argparse.ArgumentParser):
    """argparse's, with a suggestion below an unknown command, flag or choice. Subcommands get the
    same class."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and `message`, and exit with code 2."""
        super().error(with_suggestion(message, words_of(self)))


def with_suggestion(message: str, words: Iterable[str]) -> str:
    """`message` of argparse, with the nearest of `words` when it names an unknown one."""
    found = _UNKNOWN.search(message)
    if found is None:
        return message
    near = difflib.get_close_matches(found[1] or found[2] or "", list(words), n=1, cutoff=0.7)
    return f"{message}; did you mean {near[0]!r}?" if near else message


def words_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All flags, choices and commands of a parser and the parsers below it."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from words_of(below)
        yield from map(str, action.choices or ())


def version_text(command: str) -> str:
    """What `--version` prints: the version of this package and of the interface that it has."""
    return f"{command} {__version__} (the interface of torchft {UPSTREAM_API})"


def print_anywhere() -> None:
    """Let what a locale cannot encode be printed as an escape, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
