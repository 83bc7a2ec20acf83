"""The walks of `docs/architecture.md`: their files are there, belong together, and are few."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMITS = {
    "A gradient": 10,
    "A pseudo-gradient, with or without a delay": 10,
    "A quorum request": 16,
    "A worker's submission": 16,
}
SERVER = "torchft/parameter_server/"
BOUNDARIES = ("in Rust", "in another process", "by the interface")
"""What an entry says where it cannot name, or be named by, a file before it."""


@cache
def walks() -> dict[str, list[tuple[Path, str]]]:
    """The files of each walk, in order, with what is said of them."""
    text = (ROOT / "docs/architecture.md").read_text().split("\n## Four walks\n")[1]
    found: dict[str, list[tuple[Path, str]]] = {}
    for section in text.split("\n## ")[0].split("\n### ")[1:]:
        heading, body = section.split("\n", 1)
        steps = re.findall(r"^\d+\. `([^`]+)`(.*)$", body, re.MULTILINE)
        if steps:
            found[heading] = [(_file(name), said) for name, said in steps]
    return found


def _file(name: str) -> Path:
    return ROOT / (name if name.startswith(("torchft/", "lighthouse/")) else SERVER + name)


def _names(path: Path) -> set[str]:
    """What a file that needs this one has to mention: its module, or in Rust what is public."""
    if path.suffix == ".rs":
        pattern = r"^pub(?:\(crate\))? (?:struct|enum) (\w+)"
        return {f"{path.stem}::", *re.findall(pattern, path.read_text(), re.MULTILINE)}
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    package, _, last = module.rpartition(".")
    return {f"from {module} import", f"from {package} import {last}"}


def _mentions(one: Path, other: Path) -> bool:
    text = one.read_text()
    return any(re.search(rf"\b{re.escape(name)}", text) for name in _names(other))


def _belongs(path: Path, said: str, before: list[Path]) -> bool:
    """Whether an earlier file has to do with this one, or with the one that makes what is in it."""
    if said.startswith(tuple(f", {boundary}" for boundary in BOUNDARIES)):
        return True
    between = re.match(r", made by `([^`]+)`", said)
    links = [_file(between[1])] if between else []
    same = [one for one in before if one.suffix == path.suffix]
    reached = any(_mentions(one, path) or _mentions(path, one) for one in links or same)
    return reached and all(_belongs(link, "", before) for link in links)


@pytest.mark.parametrize("walk", LIMITS)
def test_a_reader_passes_few_files_and_all_of_them_exist(walk: str) -> None:
    files = [path for path, _ in walks()[walk]]
    assert [path for path in files if not path.is_file()] == []
    assert len(files) == len(set(files)) <= LIMITS[walk]


@pytest.mark.parametrize("walk", LIMITS)
def test_each_file_uses_one_before_it_is_used_by_one_or_is_behind_a_boundary(walk: str) -> None:
    steps = walks()[walk]
    strangers = [
        str(path.relative_to(ROOT))
        for at, (path, said) in enumerate(steps)
        if at and not _belongs(path, said, [file for file, _ in steps[:at]])
    ]
    assert strangers == []


def test_there_are_no_other_walks() -> None:
    assert walks().keys() == LIMITS.keys()
