"""A parameter server and its workers in processes of their own, and a wire that counts."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from harness.machine import forget_peak, peak_mib

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Memory", "Pace", "Wire", "layers", "serve", "work"]

_PIECE_BYTES = 1 << 18
_LONGEST_S = 600.0


@dataclass(frozen=True)
class Memory:
    """Of one process, in MiB."""

    base: float
    """Before there was a parameter server's work in it."""
    peak: float

    @property
    def above(self) -> float:
        """What the work took."""
        return self.peak - self.base


@dataclass(frozen=True)
class Pace:
    """One synchronisation, as one worker saw it, on the clock that all processes share."""

    began_s: float
    ended_s: float


def serve(line: Connection) -> None:
    """A worker's function. Sent the fields of `_serve`, it sends its port; sent anything, it ends
    that server and sends its Memory. At None it ends itself."""
    import torch

    torch.set_num_threads(1)
    while (case := line.recv()) is not None:
        line.send(_serve(line, **case))


def _serve(line: Connection, *, folder: str, workers: int, grace_s: float = 5.0) -> Memory:
    from torchft.parameter_server.core.options import ServerOptions
    from torchft.parameter_server.core.rules import Rules
    from torchft.parameter_server.server.server import DiLoCoServer

    with DiLoCoServer(ServerOptions(Path(folder), Rules(workers, grace_s=grace_s))) as server:
        base = forget_peak()
        line.send(server.port)
        line.recv()
        return Memory(base, peak_mib(os.getpid()))


def work(line: Connection) -> None:
    """A worker's function. Sent the fields of `_work`, it joins a server and sends its name; sent
    True, it synchronises and sends its Pace; sent None, it leaves and sends its Memory. At None it
    ends itself."""
    import torch

    torch.set_num_threads(1)
    while (case := line.recv()) is not None:
        line.send(_work(line, **case))


def _work(
    line: Connection, *, name: str, address: str, side: int, count: int, codec: str
) -> Memory:
    """Its model is `count` square layers; what moves them stands in their gradients."""
    import torch

    from torchft.parameter_server import DiLoCoWorker

    model = layers(side, count)

    class Still(torch.optim.Optimizer):
        """It changes nothing, so that a synchronisation is all that is timed."""

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            return

    inner = Still(model.parameters(), {})
    base = forget_peak()
    with DiLoCoWorker(
        *(model, inner, address), worker_id=name, sync_every=1, codec=codec, timeout_s=_LONGEST_S
    ):
        line.send(name)
        while line.recv() is not None:
            _disturb(model)
            began = time.monotonic()
            inner.step()
            line.send(Pace(began, time.monotonic()))
        return Memory(base, peak_mib(os.getpid()))


def layers(side: int, count: int) -> nn.Module:
    """`count` matrices of `side` x `side` float32, with gradients."""
    import torch
    from torch import nn

    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(count)))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    return model


def _disturb(model: nn.Module) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.add_(parameter.grad, alpha=-0.1)


class Wire:
    """Relays `127.0.0.1:port` to another port, and counts the payload that passes, both ways."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._nbytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def nbytes(self) -> int:
        """What has passed until now, headers and all."""
        with self._lock:
            return self._nbytes

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *raised: object) -> None:
        for one in [self._listener, *self._open]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed: the end
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=pair, daemon=True).start()

    def _relay(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):  # either end is closed
            while data := one.recv(_PIECE_BYTES):
                with self._lock:
                    self._nbytes += len(data)
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
