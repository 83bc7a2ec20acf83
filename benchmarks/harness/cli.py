"""A benchmark as a command. Its options are the fields of one frozen dataclass, each with its
default and its help; out comes a table for people, or one line of JSON.

    @dataclass(frozen=True)
    class Options:
        rounds: int = option(100, "how many are timed")

    if __name__ == "__main__":
        raise SystemExit(run("latency", __doc__, Options(), Options(rounds=1), measure))
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from harness import machine
from harness.figures import Figure, Result
from harness.show import as_lines
from torchft.arguments import above_zero, at_least

__all__ = ["Findings", "option", "run"]

Options = TypeVar("Options")


@dataclass(frozen=True)
class Findings:
    """What `measure` returns."""

    figures: list[Figure]
    details: dict[str, Any]


def option(default: Any, meaning: str) -> Any:
    """A field that can be given as a flag: a whole number, a number, or whole numbers in a row."""
    return field(default=default, metadata={"meaning": meaning})


def run(
    name: str,
    doc: str | None,
    usual: Options,
    quick: Options,
    measure: Callable[[Options], Findings],
    *,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, measure, print. Returns the exit code; a benchmark that fails raises."""
    typed = vars(_parser(name, doc, usual).parse_args(argv))
    as_json, is_quick = typed.pop("json"), typed.pop("quick")
    given = {key: value for key, value in typed.items() if value is not None}
    options = replace(quick if is_quick else usual, **given)  # type: ignore[type-var]
    taken_on = machine.describe()
    findings = measure(options)
    result = Result(name, tuple(findings.figures), findings.details, taken_on)
    print(result.to_json() if as_json else as_lines(result), flush=True)
    return 0


def _parser(name: str, doc: str | None, usual: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for one in fields(usual):
        parser.add_argument(
            f"--{one.name.replace('_', '-')}",
            type=_reader(one.default),
            metavar="N,N,…" if isinstance(one.default, tuple) else "N",
            help=f"{one.metadata['meaning']} (default: {_typed(one.default)})",
        )
    parser.add_argument("--json", action="store_true", help="print one line of JSON, no table")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny run, which shows only that all of it works"
    )
    return parser


def _reader(default: Any) -> Callable[[str], Any]:
    if isinstance(default, tuple):
        return _integers
    return at_least(1) if isinstance(default, int) else above_zero


def _typed(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(at_least(1), text.split(",")))
