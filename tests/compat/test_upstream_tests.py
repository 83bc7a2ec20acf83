"""PyTorch's own tests of torchft, out of its wheel, against this package: the files that are quick.
`make test-upstream` runs all files of both wheels."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.upstream import WHEELS, CannotFetch
from upstream.compare import Expected, surprises
from upstream.run import LIST, TestRun

QUICK = (
    "checkpointing/rwlock_test.py",
    "coordination_test.py",
    "data_test.py",
    "lighthouse_test.py",
    "optim_test.py",
)


@pytest.mark.timeout(600)
def test_quick_files_do_what_the_list_of_expected_failures_says(tmp_path: Path) -> None:
    wheel = WHEELS[0]
    try:
        tests = TestRun.of(wheel, tmp_path)
    except CannotFetch as error:
        pytest.skip(str(error))
    expected = Expected.read(LIST).of(wheel, QUICK)
    results = tests.run(QUICK, expected)
    assert surprises(results, expected) == []
    assert len(results) == 10
