"""DiLoCo for workers that come and go: the outer step at a server, over plain HTTP.

`rounds.py` decides when a round closes; everything around it carries bytes. Names load on first
use: a worker needs no HTTP server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchft.parameter_server.core.options import OuterOptions, ServerOptions
    from torchft.parameter_server.core.rules import Mode, Rules
    from torchft.parameter_server.server.server import Address, DiLoCoServer
    from torchft.parameter_server.worker.client import DiLoCoClient
    from torchft.parameter_server.worker.worker import DiLoCoWorker

__all__ = [
    "Address",
    "DiLoCoClient",
    "DiLoCoServer",
    "DiLoCoWorker",
    "Mode",
    "OuterOptions",
    "Rules",
    "ServerOptions",
]

_HOMES = {
    "Address": "server.server",
    "DiLoCoClient": "worker.client",
    "DiLoCoServer": "server.server",
    "DiLoCoWorker": "worker.worker",
    "Mode": "core.rules",
    "OuterOptions": "core.options",
    "Rules": "core.rules",
    "ServerOptions": "core.options",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
