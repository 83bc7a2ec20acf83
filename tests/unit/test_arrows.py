"""The arrows between the rooms of the package, read from its sources.

A room may import base and what is listed for it, nothing else of ours. What is imported for types
only does not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "torchft"
SOURCES = sorted(PACKAGE.rglob("*.py"))

BASE = {
    *("best_effort", "digest", "errors", "finite", "futures", "ledger", "ordered"),
    *("parameter_marks", "peers", "records", "settings", "step_hooks", "step_watch"),
    *("timeouts", "uncopied", "untraced", "version", "work"),
}
NUMBERS = {"compression", "quantization"}
COMMUNICATION = {"checkpointing", "collectives", "coordination", "process_group"}
DOORS = {
    *("backward", "data", "ddp", "gradients", "hsdp", "local_sgd"),
    *("optim", "pure_ddp", "strategy_hooks", "trained"),
}
RUNTIMES = {"parameter_server", "simulator"}
IMITATIONS = {"compat"}
FACES = {"cli", "integrations", "launch", "torchx"}
EXTENSION = {"_torchft"}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


# The manager is many files; they are what belongs to no other room.
MANAGER = (
    {_room(path) for path in SOURCES}
    - (BASE | NUMBERS | COMMUNICATION | DOORS | RUNTIMES | IMITATIONS | FACES)
    - {"strategies", "__init__"}
)
LIBRARY = NUMBERS | COMMUNICATION | DOORS | RUNTIMES | MANAGER | {"strategies", "__init__"}

MAY_IMPORT: dict[str, Set[str]] = {
    **dict.fromkeys(BASE | NUMBERS | {"process_group"}, frozenset()),
    "coordination": EXTENSION,
    "collectives": {"process_group", "quantization"},
    "checkpointing": {"process_group", "coordination"},
    "strategies": NUMBERS,
    **dict.fromkeys(MANAGER, COMMUNICATION | MANAGER),
    **dict.fromkeys(DOORS, MANAGER | DOORS | NUMBERS | {"process_group", "strategies"}),
    "compat": {"simulator", "strategies"},
    "simulator": NUMBERS | {"strategies", "data", "launch"},
    "parameter_server": NUMBERS | {"checkpointing", "strategies"},
    **dict.fromkeys(FACES, LIBRARY | IMITATIONS | FACES | EXTENSION),
    "__init__": LIBRARY,  # names that load on first use
}


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, also inside functions, but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child)


@cache
def _imports(path: Path) -> list[str]:
    """The modules that a file imports; `from torchft import a` counts as `torchft.a`."""
    found: list[str] = []
    for node in _statements(_tree(path)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are written in full"
            whole = node.module == "torchft"
            found += [f"torchft.{one.name}" for one in node.names] if whole else [node.module]
    return found


def _rooms(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    rooms = {name.split(".")[1] for name in _imports(path) if name.startswith("torchft.")}
    # A name with a capital is one that the package itself hands out.
    return {"__init__" if room[0].isupper() else room for room in rooms}


def _named(paths: Iterator[Path]) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


def test_a_room_imports_only_what_it_may() -> None:
    wrong = {
        str(path.relative_to(PACKAGE)): sorted(extra)
        for path in SOURCES
        if (extra := _rooms(path) - BASE - MAY_IMPORT[_room(path)] - {_room(path)})
    }
    assert not wrong, f"not allowed: {wrong}"


def test_strategies_know_nothing_of_torch_distributed() -> None:
    strategies = (path for path in SOURCES if _room(path) == "strategies")
    assert not _named(
        path
        for path in strategies
        if any(name.startswith("torch.distributed") for name in _imports(path))
    )


def test_the_environment_is_read_in_one_file() -> None:
    # `launch` and `cli` build the environments of their children.
    others = (path for path in SOURCES if _room(path) not in ("settings", "launch", "cli"))
    assert not _named(
        path
        for path in others
        if any(word in path.read_text() for word in ("os.environ", "os.getenv"))
    )


def test_nothing_is_unpickled() -> None:
    assert not _named(path for path in SOURCES if _unpickles(path))


def _unpickles(path: Path) -> bool:
    if any(name.split(".")[0] in ("pickle", "cloudpickle", "dill") for name in _imports(path)):
        return True
    return any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and "weights_only=True" not in [ast.unparse(keyword) for keyword in node.keywords]
        for node in ast.walk(_tree(path))
    )
