"""How a run of PyTorch's own tests is held against the list of expected failures."""

from __future__ import annotations

from pathlib import Path

from upstream.compare import Expected, Failure, Result, page, summary, surprises

LISTED = """
[[expected]]
wheels = ["torchft==0.2.0"]
file = "a_test.py"
tests = ["T::one", "T::two"]
reason = "needs `_private`"
"""
GOOD, BAD = Result("passed", ""), Result("failed", "ValueError: no")
NEEDS, RACES = Failure("needs `_private`", False), Failure("needs `_private`", True)


def expected(path: Path) -> Expected:
    path.write_text(LISTED)
    return Expected.read(path)


def test_a_failure_that_is_not_listed_is_a_surprise() -> None:
    assert surprises({"a_test.py::T::one": BAD}, {}) == ["a_test.py::T::one failed: ValueError: no"]


def test_a_listed_test_that_passes_or_is_gone_is_a_surprise() -> None:
    passes, gone = surprises({"one": GOOD}, {"one": NEEDS, "two": NEEDS})
    assert passes == "one is expected to fail and passed: take it out"
    assert gone == "two is expected to fail, and there is no such test: take it out"


def test_a_listed_test_that_races_may_pass() -> None:
    assert surprises({"one": GOOD, "two": BAD}, {"one": RACES, "two": RACES}) == []


def test_the_list_names_a_test_by_wheel_and_file(tmp_path: Path) -> None:
    of = expected(tmp_path / "list.toml").of
    assert list(of("torchft==0.2.0", ["a_test.py"])) == ["a_test.py::T::one", "a_test.py::T::two"]
    assert of("torchft==0.2.0", ["b_test.py"]) == of("torchft-nightly==1", ["a_test.py"]) == {}


def test_the_page_counts_by_file_and_says_why(tmp_path: Path) -> None:
    results = {
        "a_test.py::T::one": BAD,
        "a_test.py::T::two": Result("unfinished", "did not end"),
        "a_test.py::T::three": GOOD,
        "a_test.py::T::four": Result("skipped", "needs a GPU"),
    }
    assert summary(results) == "1 passed, 1 skipped, 1 failed, 1 unfinished"
    text = page({("torchft==0.2.0", "a_test.py"): results}, expected(tmp_path / "list.toml"))
    assert "| a_test.py | 1 | 2 | 1 |" in text
    assert "| a_test.py | `one`, `two` | needs `_private` |" in text
    assert "| a_test.py | `four` | needs a GPU |" in text
