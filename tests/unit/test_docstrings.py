"""What every public docstring of the package has: a sentence, and the errors that it raises.

A method without any docstring in a class with a base has that of the method it overrides.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import torchft.errors

PACKAGE = Path(__file__).parents[2] / "torchft"
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

ERRORS = {*torchft.errors.__all__} | {
    name for name, kind in vars(builtins).items() if isinstance(kind, type)
} - {"NotImplementedError"}
"""Those that a docstring says; a method for subclasses to override raises the other one."""


def _public(node: ast.Module | ast.ClassDef) -> Iterator[tuple[Definition, bool]]:
    """Public definitions, and whether each may have the docstring of one that it overrides."""
    for one in node.body:
        if isinstance(one, Definition) and not one.name.startswith("_"):
            yield one, isinstance(node, ast.ClassDef) and bool(node.bases)
            if isinstance(one, ast.ClassDef):
                yield from _public(one)


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """What a function does itself, without what is defined in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Definition | ast.Lambda):
            yield child
            yield from _own(child)


def _raised(node: Definition) -> set[str]:
    calls = (one.exc for one in _own(node) if isinstance(one, ast.Raise))
    return {ast.unparse(call.func) for call in calls if isinstance(call, ast.Call)} & ERRORS


def _problem(node: Definition, overrides: bool) -> str | None:
    text = ast.get_docstring(node) or ""
    decorated = {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}
    if decorated & {"overload", "setter"}:
        return None
    if len(text.split()) < 6 and not (overrides and not text):
        return "fewer than six words"
    unsaid = set() if isinstance(node, ast.ClassDef) else _raised(node)
    unsaid = {name for name in unsaid if name not in text or "aises" not in text}
    return f"raises {', '.join(sorted(unsaid))} unsaid" if unsaid and text else None


def test_every_public_docstring_is_a_sentence_and_names_what_is_raised() -> None:
    problems = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {problem}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node, overrides in _public(ast.parse(path.read_text()))
        if (problem := _problem(node, overrides))
    ]
    assert not problems, "\n".join(problems)
