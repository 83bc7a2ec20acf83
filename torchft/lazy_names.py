"""Names that load when they are first used: those of a package, and those of old modules."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

__all__ = ["lazy_names", "old_modules"]


def lazy_names(
    package: str,
    modules: Mapping[str, Iterable[str]],
    *,
    old: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and `__dir__` of a package that imports its modules on first use.

        __getattr__, __dir__ = lazy_names(__name__, {"loop": ["run"]}, old={"go": "a.run"})

    Args:
        package: the package's name.
        modules: submodule, relative to the package → the public names that it defines.
        old: a name of an earlier release → the full path of what it is now: an attribute of a
            module. Using it gives a DeprecationWarning.
    """
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names}
    renamed = dict(old or {})

    def load(name: str) -> Any:
        if name in renamed:
            return _renamed(f"{package}.{name}", renamed[name])
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names


def old_modules(package: str, moved: Mapping[str, str], **names: str) -> None:
    """Let modules of an earlier release be imported; taking a name gives a DeprecationWarning.

    Args:
        package: whose modules they were. Its `__init__.py` makes the call.
        moved: old module, relative to the package → the full path of what it is now.
        names: old name → new name, of what was renamed in them.
    """
    for module, new in moved.items():
        path = f"{package}.{module}"
        old = ModuleType(path, f"Deprecated: now `{new}`.")
        vars(old)["__getattr__"] = _getattr_of(path, new, names)
        sys.modules[path] = old
        setattr(sys.modules[package], module, old)


def _getattr_of(path: str, new: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        now = names.get(name, name)
        # Python's import asks for names like __path__.
        if now.startswith("__") or not hasattr(importlib.import_module(new), now):
            raise AttributeError(f"module {path!r} has no attribute {name!r}")
        return _renamed(f"{path}.{name}", f"{new}.{now}")

    return load


def _renamed(old: str, new: str) -> Any:
    """What the full path `new` names, an attribute of a module or a module; warns the caller of a
    `__getattr__` that it asks for it as `old`."""
    warnings.warn(f"{old} is now {new}", DeprecationWarning, stacklevel=3)
    module, _, name = new.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    return importlib.import_module(new) if found is None else found
