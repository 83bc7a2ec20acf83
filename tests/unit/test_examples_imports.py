"""The examples import what a user's own script could: names that their modules list as public."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

MODULES = {"torchft.experiments.datasets"}
"""Modules that the documents import as names of their package."""


def imported(script: Path) -> Iterator[tuple[str, str]]:
    """Module and name of everything that it imports of the package."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if "torchft" in alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchft"):
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize(
    "script", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: str(path.relative_to(EXAMPLES))
)
def test_an_example_imports_public_names_only(script: Path) -> None:
    foreign = [
        f"{module}.{name}"
        for module, name in imported(script)
        if name not in importlib.import_module(module).__all__
    ]
    assert set(foreign) <= MODULES
