"""DiLoCo for workers that come and go: the outer step at a server, over plain HTTP.

`rounds.py` decides when a round closes; everything around it carries bytes. Names load on first
use: a worker needs no HTTP server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchft.parameter_server.client import DiLoCoClient
    from torchft.parameter_server.options import OuterOptions, ServerOptions
    from torchft.parameter_server.rules import Mode, Rules
    from torchft.parameter_server.server import Address, DiLoCoServer
    from torchft.parameter_server.worker import DiLoCoWorker

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
    "Address": "server",
    "DiLoCoClient": "client",
    "DiLoCoServer": "server",
    "DiLoCoWorker": "worker",
    "Mode": "rules",
    "OuterOptions": "options",
    "Rules": "rules",
    "ServerOptions": "options",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
