"""What one file may know of the objects of another: their public names, which their class says.

A `_private` name is for the file that gives it to its objects. Nobody asks an object of ours, with
`getattr(x, "name", default)` or `hasattr`, whether it has a name. The exceptions are objects that
others make; each is listed with whose it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

Owners = Mapping[str, set[str]]
Reader = Callable[[ast.AST], set[str]]

PACKAGE = Path(__file__).parents[2] / "torchft"

PRIVATE_OF = {
    "Python's, which have no public twin": {
        "_ArgumentGroup",
        "_SubParsersAction",
        "_actions",
        "_exit",
    },
    "torch's autograd engine": {"_C", "_current_graph_task_id", "_execution_engine"},
    "torch's reducer, whose buckets are filled here": {
        *("_autograd_hook", "_get_zeros_like_grad_buckets"),
        *("_push_all_rebuilt_params", "_rebuild_buckets"),
    },
    "torch's modules and tensors, read quicker than in public or not at all": {
        *("_forward_pre_hooks", "_metadata", "_modules", "_non_persistent_buffers_set"),
        *("_parameters", "_values", "_version"),
    },
    "torch's optimizers, by which GradScaler knows who looks at infinities": {
        "_step_supports_amp_scaling"
    },
    "torch's process groups": {
        *("_Options", "_devices", "_get_backend", "_get_process_group_name"),
        *("_reduce_scatter_base", "_register_backend", "_set_default_backend"),
        *("_set_sequence_number_for_group", "_timeout"),
    },
    "torch's compiler": {"_disable_dynamo"},
    "the extension's, named as torchft's scripts call them": {
        *("_checkpoint_metadata", "_end_group", "_quorum"),
    },
}
PERHAPS_OF = {
    "Python's": {
        *("__dict__", "__file__", "__func__", "__getitem__", "__getitems__", "__len__"),
        *("__name__", "_fields", "_inheriting"),
    },
    "torch's, in some versions or kinds of objects": {
        *("_ddp_params_and_buffers_to_ignore", "_metadata", "_orig_mod", "hooked", "set_timeout"),
        *("AcceleratorError", "ProcessGroupNCCL2", "Stream", "get_error", "to_local"),
    },
    "an optimizer, or an object that is used like one": {
        *("_step_supports_amp_scaling", "defaults", "optimizer", "param_groups", "state", "step"),
    },
    "a process group of a script's own": {"generation"},
    "a function that has arguments by old names": {"renamed_arguments"},
    "a model's output, a hook, a setting, or what a recipe returns": {
        *("config", "loss", "name", "shape"),
    },
}
"""Whose the objects are that may have these names or not."""

OTHERS = """
import shelf

class Shelf:
    def __init__(self):
        self._books = []
    def take(self, other):
        return other._books, shelf.one._lock

def titles(shelf):
    return getattr(shelf, "titles", None), hasattr(shelf, "pages")
"""


def _names(owners: Owners) -> set[str]:
    return set[str]().union(*owners.values())


def _is_own(node: ast.Attribute) -> bool:
    return ast.unparse(node.value) in ("self", "cls", "super()")


def _given(tree: ast.AST) -> Iterator[str]:
    """The names that a file gives to its own classes and objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node):
            yield node.attr


def _private(tree: ast.AST) -> set[str]:
    """The private names that a file reads of objects of other files."""
    read = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    private = [node for node in read if re.match("_(?!_)", node.attr)]
    others = {node.attr for node in private if not _is_own(node)}
    return others - set(_given(tree)) if others else others


def _perhaps(tree: ast.AST) -> set[str]:
    """The names that a file asks objects for, other than modules and its own `self`."""
    asked: list[tuple[ast.expr, str]] = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name("getattr"), [of, ast.Constant(str(name)), _]):
                asked.append((of, name))
            case ast.Call(ast.Name("hasattr"), [of, ast.Constant(str(name))]):
                asked.append((of, name))
    return {name for of, name in asked if ast.unparse(of) not in ("self", "os", "mmap", "socket")}


def _found(read: Reader) -> dict[str, set[str]]:
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    return {str(path.relative_to(PACKAGE)): read(tree) for path, tree in trees.items()}


@pytest.mark.parametrize("read, owners", [(_private, PRIVATE_OF), (_perhaps, PERHAPS_OF)])
def test_files_know_the_public_names_of_each_other(read: Reader, owners: Owners) -> None:
    found = _found(read)
    wrong = {path: names - _names(owners) for path, names in found.items()}
    assert not {path: names for path, names in wrong.items() if names}
    assert _names(owners) == set().union(*found.values()) & _names(owners), "no longer needed"


def test_reaching_into_others_is_seen() -> None:
    tree = ast.parse(OTHERS)
    assert _private(tree) == {"_lock"}
    assert _perhaps(tree) == {"titles", "pages"}
