"""DiLoCo for workers that come and go: the outer step at a server, over plain HTTP.

`rounds.py` decides when a round closes; everything around it carries bytes. Names load on first
use: a worker needs no HTTP server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchft.lazy_names import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "core.options": ["OuterOptions", "ServerOptions"],
        "core.rules": ["Mode", "Rules"],
        "server.server": ["Address", "DiLoCoServer"],
        "worker.client": ["DiLoCoClient"],
        "worker.worker": ["DiLoCoWorker"],
    },
)
