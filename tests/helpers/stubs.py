"""Modules that the public gRPC tools generate from `proto/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Stubs"]


@dataclass(frozen=True)
class Stubs:
    """The generated modules: messages, and service stubs."""

    messages: Any
    services: Any
