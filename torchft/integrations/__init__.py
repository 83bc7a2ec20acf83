"""Callbacks for trainers that people already use. Names load on first use, with their trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchft.integrations.transformers import DiLoCoCallback

__all__ = ["DiLoCoCallback"]

_HOMES = {"DiLoCoCallback": "transformers"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
