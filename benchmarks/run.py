"""Runs the benchmarks one after the other and prints one markdown table of their figures.

    python benchmarks/run.py                        all but those of LONG, about ten minutes
    python benchmarks/run.py startup recovery_time  these two
    python benchmarks/run.py --json > figures.jsonl one line of JSON each, with all details

A figure that misses its goal is shown as missed; the exit code is 0 all the same. It is 1 when a
benchmark itself failed; the others still run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.figures import Result
from harness.show import as_markdown, taken_on

BENCHMARKS = (
    "startup",
    "quorum_latency",
    "commit_latency",
    "allreduce_overhead",
    "guards",
    "diloco_overhead",
    "recovery_time",
    "simulator",
    "simulator_starts",
    "codecs",
    "learning",
    "variants",
    "server",
    "server_faults",
    "server_learning",
)
"""Each a script beside this one, in the order in which they run."""

LONG = ("learning", "variants", "server", "server_faults", "server_learning")
"""These run only when they are named."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    typed = _parser().parse_args(argv)
    results: list[Result] = []
    failed: list[str] = []
    for name in typed.names or [name for name in BENCHMARKS if name not in LONG]:
        print(f"{name} …", file=sys.stderr, flush=True)
        result = _run(name, ["--quick"] if typed.quick else [])
        if result is None:
            failed.append(name)
            continue
        results.append(result)
        if typed.json:
            print(result.to_json(), flush=True)
    if results and not typed.json:
        print(as_markdown(results))
        print(f"\nTaken on: {taken_on(results[0])}.")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(name: str, flags: list[str]) -> Result | None:
    """None when it failed; it has said why."""
    script = Path(__file__).with_name(f"{name}.py")
    command = [sys.executable, str(script), "--json", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return Result.from_json(done.stdout) if done.returncode == 0 else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(BENCHMARKS)
    parser.add_argument("names", nargs="*", type=_known, metavar="NAME", help=f"some of: {names}")
    parser.add_argument("--json", action="store_true", help="one line of JSON each, no table")
    parser.add_argument(
        "--quick", action="store_true", help="tiny runs, which show only that all of it works"
    )
    return parser


def _known(name: str) -> str:
    if name not in BENCHMARKS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(BENCHMARKS)}")
    return name


if __name__ == "__main__":
    raise SystemExit(main())
