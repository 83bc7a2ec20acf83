"""What torch's backends do not tell or do alike: end what is pending, say whether a member is gone.

Gloo's connections are cut, which frees who waits at both ends. A backend that communicates on a
device by itself, such as NCCL, has no connection that anybody could cut: it aborts its own part,
and peers learn of a death from the lighthouse or from their own deadline (`watchdog.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import distributed as dist

from torchft.process_group import sockets
from torchft.process_group.attempt import Attempt

__all__ = ["Aborting", "Connections", "Control"]

_log = logging.getLogger(__name__)


class Control(Protocol):
    """How one backend is ended and watched. `backend` is what the operations are called on."""

    on_device: bool
    """Whether a device runs the operations, so that waiting for one holds up its stream only."""

    def end(self, backend: Any) -> None:
        """End what is pending with an error. Never blocks."""
        ...

    def lost(self, backend: Any) -> bool:
        """Whether a member is known to be gone."""
        ...

    def failure(self, backend: Any) -> str | None:
        """What the backend itself says has gone wrong in it; None while it says nothing."""
        ...


class Connections:
    """Of a backend that talks over sockets of this process: gloo."""

    on_device = False

    def __init__(self, own: Sequence[sockets.OwnSocket] = ()) -> None:
        self._own = tuple(own)

    def end(self, backend: Any) -> None:
        """Cut them: pending operations fail here and at every peer."""
        sockets.cut(self._own)

    def lost(self, backend: Any) -> bool:
        """Whether one of them has ended."""
        return not all(map(sockets.is_open, self._own))

    def failure(self, backend: Any) -> str | None:
        """None: gloo's errors are those of its operations."""
        return None


class Aborting:
    """Of a backend that ends its own operations when it is told to abort: NCCL and its kin."""

    on_device = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def end(self, backend: Any) -> None:
        """Abort on a thread of its own: NCCL may wait for its kernels to notice."""
        Attempt(lambda _: self._abort(backend))

    def lost(self, backend: Any) -> bool:
        """Whether the backend has found an error, of which a lost member is the usual cause."""
        return self.failure(backend) is not None

    def failure(self, backend: Any) -> str | None:
        """The name of torch's ErrorType, such as `TIMEOUT` or `COMM_ERROR`."""
        one = self._inner(backend)
        if not hasattr(one, "get_error"):  # vendors' backends of before torch 2.7
            return None
        error = one.get_error()
        return None if error == type(error).SUCCESS else str(error.name)

    def _abort(self, backend: Any) -> None:
        try:
            self._inner(backend).abort()
        except RuntimeError as error:
            _log.warning("a process group could not be aborted: %s", error)

    def _inner(self, backend: Any) -> Any:
        """The one backend of a torch process group, whose own `abort` older torch lacks."""
        if isinstance(backend, dist.ProcessGroup):
            return backend._get_backend(self._device)
        return backend
