"""Runs at the start of every Python process of `make test-upstream`, and as a plugin of its pytest.

`torchft` is this repository's package. Names of test modules that it lacks, such as
`torchft.manager_integ_test`, are found among the files that the runner took out of a wheel. Where a
test file imports a private name, `STAND_INS` has something empty in its place, so that those tests
of the file run that do not need it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

TEST_MODULE = re.compile(r"torchft(\.checkpointing)?\.(_test(\..+)?|_test_utils|\w+_(test|bench))")

STAND_INS = {
    ("torchft.checkpointing.http_transport", "_time"): type("_time", (), {}),
    ("torchft.futures", "_TIMEOUT_MANAGER"): SimpleNamespace(_watchdog_interval=None),
    ("torchft.manager", "_ManagedWork"): type("_ManagedWork", (), {}),
    ("torchft.process_group", "_ErrorSwallowingWork"): type("_ErrorSwallowingWork", (), {}),
}


class TestModules:
    """Finds test modules below the folder `UPSTREAM_TESTS`, for Python's import."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not TEST_MODULE.fullmatch(name):
            return None
        folder = os.path.join(os.environ["UPSTREAM_TESTS"], *name.split(".")[:-1])
        return PathFinder.find_spec(name, [folder], target)


sys.meta_path.append(TestModules)  # type: ignore[arg-type]


def pytest_configure() -> None:
    for (module, name), stand_in in STAND_INS.items():
        if not hasattr(importlib.import_module(module), name):
            setattr(importlib.import_module(module), name, stand_in)


def record(**fields: Any) -> None:
    """Append one JSON line to the file `UPSTREAM_RESULTS`."""
    with open(os.environ["UPSTREAM_RESULTS"], "a") as file:
        file.write(json.dumps(fields) + "\n")


def name_of(nodeid: str) -> str:
    """A test's name: `optim_test.py::TestOptim::test_optimizer_wrapper`."""
    return nodeid.removeprefix("torchft/")


def pytest_runtest_logstart(nodeid: str) -> None:
    record(test=name_of(nodeid), outcome="unfinished", message="did not end")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        record(test=name_of(report.nodeid), outcome=report.outcome, message=message(report))


def pytest_collectreport(report: Any) -> None:
    if report.outcome != "passed":
        record(
            test=f"{name_of(report.nodeid)}::import",
            outcome=report.outcome,
            message=message(report),
        )


def message(report: Any) -> str:
    """Why it was skipped, or the line that says what was wrong."""
    told = report.longrepr
    if isinstance(told, tuple):
        return str(told[2]).removeprefix("Skipped: ")
    crash = getattr(told, "reprcrash", None)
    text = crash.message if crash else str(told or "")
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if crash and lines else lines[-1] if lines else "")[:300]


def pytest_unconfigure() -> None:
    """Threads that a test left must not keep the process."""
    record(test="", outcome="ended", message="")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
