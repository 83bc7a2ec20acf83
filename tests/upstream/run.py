"""Runs the tests in the wheels of PyTorch's torchft against this package: `make test-upstream`.

A wheel's test files are copied, at run time, into a temporary folder; this repository holds none of
them. Each file runs in a process of its own, each test under a deadline; a test that ends its
process is recorded, and the rest of its file runs in the next one. `expected.toml` lists the tests
that fail, and why. A failure that is not in it, and a test in it that passes or is gone, fail the
command. A run of everything writes `docs/compatibility.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.upstream import REPOSITORY, WHEELS, fetched, site_of
from upstream.compare import Expected, Result, Results, page, summary, surprises

__all__ = ["LIST", "TestRun"]

HERE = Path(__file__).parent
LIST = HERE / "expected.toml"
TOOLS = ("expecttest==0.3.0", "parameterized==0.9.0")
"""What the tests import beside what our own tests need."""
TEST_TIMEOUT_S = 120
FILE_TIMEOUT_S = 1200
TRIES = 3
"""Some of these tests race on a loaded machine: a failure that is not listed must happen again."""


@dataclass(frozen=True)
class TestRun:
    """The test files of one wheel, in a folder of their own."""

    __test__ = False  # no test class of pytest's

    stage: Path
    tools: Path
    files: tuple[str, ...]
    """Their paths below `torchft/`."""

    @classmethod
    def of(cls, wheel: str, stage: Path) -> TestRun:
        """Take the test files out of a wheel into the empty folder `stage`.

        Raises:
            CannotFetch: if the wheel, or what its tests import, is not here and cannot be fetched.
        """
        package, names = site_of(wheel) / "torchft", []
        for path in sorted(package.rglob("*.py")):
            name = path.relative_to(package)
            if name.parts[0] == "_test" or path.stem.endswith(("_test", "_bench", "_test_utils")):
                (stage / "torchft" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, stage / "torchft" / name)
                if path.stem.endswith("_test"):
                    names.append(str(name))
        return cls(stage, fetched(TOOLS, REPOSITORY / ".venv-upstream-tools"), tuple(names))

    def run(self, files: Sequence[str], allowed: Collection[str]) -> Results:
        """Run whole files; what fails and is not `allowed` to runs up to `TRIES` times."""
        results = self._all(files)
        for _ in range(TRIES - 1):
            failed = [name for name, one in results.items() if one.bad and name not in allowed]
            failed = [name for name in failed if not name.endswith("::import")]
            results |= self._all(failed) if failed else {}
        return results

    def _all(self, what: Sequence[str]) -> Results:
        """Run files or tests, in as many processes as it takes."""
        results: Results = {}
        while left := [one for one in what if one not in results]:
            new, ended = self._once(left, results)
            results |= new
            if ended:
                break
            if not new:
                return results | dict.fromkeys(left, Result("unfinished", "its process crashed"))
        return results

    def _once(self, what: Sequence[str], done: Collection[str]) -> tuple[Results, bool]:
        """What one process recorded, and whether it came to its end."""
        tests, record = self.stage / "torchft", self.stage / "results.jsonl"
        record.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "sitecustomize", "-c", os.devnull]
        command += [f"--rootdir={self.stage}", "-p", "no:cacheprovider"]
        command += [f"--timeout={TEST_TIMEOUT_S}", "--timeout-method=thread"]
        command += [f"{tests}/{one}" for one in what]
        command += [f"--deselect=torchft/{test}" for test in done]
        self._in_a_session(command, self._environment(record))
        lines = record.read_text().splitlines() if record.exists() else []
        results = {
            one["test"]: Result(one["outcome"], one["message"]) for one in map(json.loads, lines)
        }
        return results, results.pop("", None) is not None

    def _environment(self, record: Path) -> dict[str, str]:
        found = (HERE / "child", REPOSITORY, self.tools)
        return os.environ | {
            "PYTHONHASHSEED": "0",  # some names of tests have the place in a set in them
            "PYTHONPATH": os.pathsep.join(map(str, found)),
            "UPSTREAM_TESTS": str(self.stage),
            "UPSTREAM_RESULTS": str(record),
        }

    def _in_a_session(self, command: list[str], environment: dict[str, str]) -> None:
        """Run a command; at its end, or at the deadline, kill what it has started as well."""
        with (self.stage / "output.txt").open("ab") as output:
            child = subprocess.Popen(
                command,
                cwd=self.stage,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(FILE_TIMEOUT_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            child.wait()


def run_wheel(wheel: str, parts: list[str], expected: Expected) -> dict[tuple[str, str], Results]:
    """Run the files whose path has one of `parts` in it, or all; say what each file did."""
    found: dict[tuple[str, str], Results] = {}
    with tempfile.TemporaryDirectory(prefix="torchft-tests-") as stage:
        tests = TestRun.of(wheel, Path(stage))
        for file in tests.files:
            if parts and not any(part in file for part in parts):
                continue
            allowed = expected.of(wheel, [file])
            results = found[wheel, file] = tests.run([file], allowed)
            print(f"{wheel} {file}: {summary(results)}", flush=True)
            for surprise in surprises(results, allowed):
                print(f"  {surprise}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help="only files whose path has one of these in it")
    parser.add_argument("--wheel", choices=WHEELS, action="append", help="only this wheel")
    args = parser.parse_args()
    expected = Expected.read(LIST)
    found: dict[tuple[str, str], Results] = {}
    for wheel in args.wheel or WHEELS:
        found |= run_wheel(wheel, args.files, expected)
    if any(surprises(results, expected.of(w, [file])) for (w, file), results in found.items()):
        sys.exit("not what tests/upstream/expected.toml says: see the lines that are indented")
    if not args.files and not args.wheel:
        (REPOSITORY / "docs/compatibility.md").write_text(page(found, expected))


if __name__ == "__main__":
    main()
