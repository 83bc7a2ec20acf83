"""The arrows between the rooms of the package, read from its sources.

A room may import base and what is listed for it, nothing else of ours. What is imported for types
only does not count.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping, Set
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "torchft"
RUST = PACKAGE.parent / "lighthouse"
SOURCES = sorted(PACKAGE.rglob("*.py"))

BASE = {
    *(
        "arguments",
        "atomic",
        "best_effort",
        "devices",
        "digest",
        "errors",
        "finite",
        "futures",
        "lazy_names",
    ),
    *("ledger", "ordered", "parameter_marks", "peers", "records", "renamed", "retry", "seeds"),
    *("settings", "sharded", "step_guard", "step_hooks", "step_watch"),
    *("timeouts", "uncopied", "untraced", "version", "work"),
}
FRONTS = {
    *("backward", "data", "ddp", "grad_scaler", "gradients", "local_sgd"),
    *("optim", "pure_ddp", "replicated", "replicated_arguments", "sharded_ddp"),
    *("strategy_hooks", "trained"),
}
ROOMS = {
    *("checkpointing", "collectives", "compat", "demo", "experiments", "launch", "manager"),
    *("network_namespaces", "parameter_server", "process_group", "quantization", "script"),
    *("simulator", "strategies", "toy", "verify"),
}
FACES = {"cli", "integrations", "torchx"}
BUILDERS = {"settings", "demo", "experiments", "launch", "network_namespaces"}
"""Those that build the environments of their children, and what reads our own."""
EXTENSION = {"_torchft", "coordination"}

MAY_IMPORT: dict[str, Set[str]] = {
    **dict.fromkeys(BASE, frozenset()),
    "coordination": {"_torchft"},
    "quantization": frozenset(),
    "process_group": EXTENSION,
    "checkpointing": EXTENSION | {"process_group"},
    "collectives": {"process_group", "quantization"},
    "strategies": {"quantization"},
    "manager": EXTENSION | {"checkpointing", "collectives", "process_group", "quantization"},
    **dict.fromkeys(FRONTS, FRONTS | {"manager", "process_group", "quantization", "strategies"}),
    "simulator": {"quantization", "strategies"},
    "toy": frozenset(),
    "launch": EXTENSION,
    "script": frozenset(),
    "network_namespaces": frozenset(),
    # `local_node` is a real group: it makes a manager.
    "experiments": EXTENSION
    | {"data", "launch", "manager", "process_group", "quantization"}
    | {"replicated", "simulator", "strategies", "toy"},
    "compat": {"experiments", "simulator", "strategies"},
    "parameter_server": {"checkpointing", "quantization", "strategies"},
    **dict.fromkeys(("demo", "verify"), EXTENSION | FRONTS | ROOMS | {"__init__"}),
    **dict.fromkeys(FACES, EXTENSION | FRONTS | ROOMS | FACES | {"__init__"}),
    "__init__": FRONTS | {"manager", "process_group"},  # names that load on first use
}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def test_every_room_is_named() -> None:
    assert {_room(path) for path in SOURCES} == MAY_IMPORT.keys()


def test_the_architecture_document_names_every_package() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    packages = {init.parent.name for init in PACKAGE.glob("*/__init__.py")}
    drawn = {name for name in packages if f"\n  {name}/" in text and f"`{name}`" in text}
    assert drawn == packages


def test_no_two_rooms_import_each_other_and_no_files_in_a_circle() -> None:
    files = {_module(path): path for path in SOURCES}
    graph = {name: {*_files(path, files)} - {name} for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, with the circle
    rooms: dict[str, set[str]] = {}
    for path in SOURCES:
        rooms.setdefault(_room(path), set()).update(_rooms(path) - {_room(path)} - {"__init__"})
    TopologicalSorter(rooms).prepare()


def _module(path: Path) -> str:
    whole = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return whole.removesuffix(".__init__")


def _files(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    """The files that a file imports. A package whose submodule is asked for does not count."""
    for node in _statements(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module in files:
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in files else node.module


def test_the_rust_core_knows_no_network_and_the_servers_no_python() -> None:
    def needs(crate: str) -> set[str]:
        return set(tomllib.loads((RUST / crate / "Cargo.toml").read_text())["dependencies"])

    assert needs("quorum") == {"thiserror"}
    assert "pyo3" not in needs("server")
    assert not needs("python") & {"tonic", "axum", "prost"}


def test_strategies_know_nothing_of_torch_distributed() -> None:
    strategies = (path for path in SOURCES if _room(path) == "strategies")
    assert not _named(
        path
        for path in strategies
        if any(name.startswith("torch.distributed") for name in _imports(path))
    )


def test_the_environment_is_read_in_one_file() -> None:
    others = (path for path in SOURCES if _room(path) not in BUILDERS)
    assert not _named(
        path
        for path in others
        if any(word in path.read_text() for word in ("os.environ", "os.getenv"))
    )


def test_nothing_is_unpickled_but_an_index_that_may_name_listed_classes_alone() -> None:
    unpickled = _named(path for path in SOURCES if _unpickles(path))
    assert unpickled == ["checkpointing/tensor_index.py"]


def _unpickles(path: Path) -> bool:
    if any(name.split(".")[0] in ("pickle", "cloudpickle", "dill") for name in _imports(path)):
        return True
    return any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and "weights_only=True" not in [ast.unparse(keyword) for keyword in node.keywords]
        for node in ast.walk(_tree(path))
    )
