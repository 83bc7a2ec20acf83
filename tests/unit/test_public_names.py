"""What the package's public names promise together."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import torchft

IMITATIONS = "torchft.compat"
"""It has the class names of other systems, under those systems' paths."""


def public_classes() -> dict[str, dict[type, str]]:
    """Class name → every class of that name that users import → where from."""
    found: dict[str, dict[type, str]] = {}
    for info in (None, *pkgutil.iter_modules(torchft.__path__, "torchft.")):
        module = importlib.import_module("torchft" if info is None else info.name)
        if module.__name__ != IMITATIONS:
            for name in getattr(module, "__all__", ()):
                if inspect.isclass(value := getattr(module, name)):
                    found.setdefault(name, {})[value] = module.__name__
    return found


def test_no_two_public_classes_share_a_name() -> None:
    shared = {name: set(homes.values()) for name, homes in public_classes().items()}
    assert {name: homes for name, homes in shared.items() if len(homes) > 1} == {}
