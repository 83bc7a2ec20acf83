"""What a run of upstream's tests found, against the failures that are expected of it."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Expected", "Failure", "Found", "Result", "Results", "page", "summary", "surprises"]

OUTCOMES = ("passed", "skipped", "failed", "unfinished")
NOTES = Path(__file__).with_name("notes.md")
"""What the page says beside the tables."""


@dataclass(frozen=True)
class Result:
    """What became of one test."""

    outcome: str
    """One of `OUTCOMES`; unfinished: at its deadline, or its process crashed."""
    message: str
    """Why it failed or was skipped."""

    @property
    def bad(self) -> bool:
        """Whether it neither passed nor was skipped."""
        return self.outcome in ("failed", "unfinished")


Results = dict[str, Result]
"""By the name of the test, such as `optim_test.py::TestOptim::test_step`. `optim_test.py::import`
stands for a file that cannot be imported."""
Found = dict[tuple[str, str], Results]
"""By wheel and file."""


@dataclass(frozen=True)
class Failure:
    """Why a test is expected to fail."""

    reason: str
    races: bool
    """Whether it passes at times: it is then not held against the list."""


@dataclass(frozen=True)
class Expected:
    """The list of expected failures: by wheel, the names of the tests and why."""

    failures: dict[str, dict[str, Failure]]

    @classmethod
    def read(cls, path: Path) -> Expected:
        """Read the list from a TOML file."""
        failures: dict[str, dict[str, Failure]] = {}
        for entry in tomllib.loads(path.read_text())["expected"]:
            failure = Failure(entry["reason"], entry.get("races", False))
            for wheel in entry["wheels"]:
                names = (f"{entry['file']}::{test}" for test in entry["tests"])
                failures.setdefault(wheel, {}).update(dict.fromkeys(names, failure))
        return cls(failures)

    def of(self, wheel: str, files: Iterable[str]) -> dict[str, Failure]:
        """The expected failures of these files, by the name of the test."""
        files = set(files)
        of_wheel = self.failures.get(wheel, {})
        return {name: of_wheel[name] for name in of_wheel if file_of(name) in files}


def file_of(test: str) -> str:
    """The file that a test is in."""
    return test.partition("::")[0]


def surprises(results: Results, expected: dict[str, Failure]) -> list[str]:
    """What differs from the list, a line each."""
    lines = [
        f"{name} {result.outcome}: {result.message}"
        for name, result in results.items()
        if result.bad and name not in expected
    ]
    for name, failure in expected.items():
        if name not in results:
            lines.append(f"{name} is expected to fail, and there is no such test: take it out")
        elif not results[name].bad and not failure.races:
            lines.append(f"{name} is expected to fail and {results[name].outcome}: take it out")
    return lines


def summary(results: Results) -> str:
    """How many tests of a file had which outcome: "2 passed, 1 skipped"."""
    counts = Counter(result.outcome for result in results.values())
    return ", ".join(f"{counts[one]} {one}" for one in OUTCOMES if counts[one]) or "no tests here"


def page(found: Found, expected: Expected) -> str:
    """The document about all wheels."""
    wheels = list(dict.fromkeys(wheel for wheel, _ in found))
    tables = [_table(wheel, found, expected) for wheel in wheels]
    parts = [_HEAD, *tables, _expected(expected), _skipped(found), NOTES.read_text().strip()]
    return "\n\n".join(parts) + "\n"


_HEAD = """# Tests of PyTorch's torchft, run here

For users of PyTorch's torchft who want to know what of it this package has. `make test-upstream`
wrote this page. It takes the tests out of two wheels of PyTorch's torchft and runs them against
this package, on CPUs. A failure that is not listed below, and a listed one that passes, fail the
command."""


def _table(wheel: str, found: Found, expected: Expected) -> str:
    lines = ["| file | passed | expected to fail | skipped |", "|---|---|---|---|"]
    sums: Counter[str] = Counter()
    for (of, file), results in found.items():
        if of == wheel:
            listed = expected.of(wheel, [file])
            counts = Counter("failed" if n in listed else r.outcome for n, r in results.items())
            sums += counts
            lines.append(f"| {file} | {_row(counts)} |")
    return "\n".join([f"## {wheel}", "", *lines, f"| together | {_row(sums)} |"])


def _row(counts: Counter[str]) -> str:
    return " | ".join(str(counts[outcome]) for outcome in ("passed", "failed", "skipped"))


def _expected(expected: Expected) -> str:
    rows: dict[tuple[str, str], set[str]] = {}
    for failures in expected.failures.values():
        for name, failure in failures.items():
            races = " It passes at times." if failure.races else ""
            rows.setdefault((file_of(name), failure.reason + races), set()).add(name)
    return _rows("Expected failures", rows)


def _skipped(found: Found) -> str:
    rows: dict[tuple[str, str], set[str]] = {}
    for results in found.values():
        for name, result in results.items():
            if result.outcome == "skipped":
                rows.setdefault((file_of(name), result.message), set()).add(name)
    return _rows("Skipped here", rows)


def _rows(title: str, rows: dict[tuple[str, str], set[str]]) -> str:
    lines = [f"## {title}", "", "| file | tests | why |", "|---|---|---|"]
    for (file, reason), names in sorted(rows.items()):
        lines.append(f"| {file} | {_short(names)} | {reason} |")
    return "\n".join(lines)


def _short(names: set[str], most: int = 3) -> str:
    """The names without their class; of many, how many they are."""
    short = sorted({f"`{name.rpartition('::')[2]}`" for name in names})
    if short == ["`import`"]:
        return "the file, which cannot be imported"
    return ", ".join(short) if len(short) <= most else f"{len(short)} tests"
