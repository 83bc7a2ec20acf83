"""How the demos end: a summary as text for people, or as one JSON object for programs."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchft.demo.run import RunSummary
    from torchft.demo.view import View

__all__ = ["add_json_flag", "show", "view_for"]


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """Add the option `--json` to a parser."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the summary as one JSON object on standard output; progress goes to standard "
        "error",
    )


def view_for(typed: argparse.Namespace) -> View:
    """Where progress is shown: never between a program and its JSON."""
    from torchft.demo.view import choose_view

    return choose_view(sys.stderr if typed.json else None)


def show(summary: RunSummary, *, as_json: bool) -> int:
    """Print `summary` and return the exit code: 0 when good, 1 when not, 128 + n after signal n."""
    if as_json:
        print(json.dumps({"good": summary.good, **asdict(summary)}, default=str))
    else:
        print(summary.text())
    if summary.stopped_by is not None:
        return 128 + summary.stopped_by
    return 0 if summary.good else 1
