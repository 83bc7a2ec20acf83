"""Module-level `__getattr__` for packages whose names load when they are first used."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["lazy_names"]


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
            warnings.warn(
                f"{package}.{name} is now {renamed[name]}", DeprecationWarning, stacklevel=2
            )
            return _found(renamed[name])
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names


def _found(path: str) -> Any:
    """What a full path names: an attribute of a module, or a module."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    return importlib.import_module(path) if found is None else found
