"""A TCP relay whose connections can fall silent without closing, as when a host vanishes."""

from __future__ import annotations

import socket
import threading
from types import TracebackType

__all__ = ["Relay"]


class Relay:
    """Relays `127.0.0.1:port` to another port, in threads that end with it."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.accepted = 0
        self._sockets: list[socket.socket] = []
        self._silent: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for s in self._sockets:
            s.close()

    def fall_silent(self) -> None:
        """From now on nothing passes on the connections that are open; new ones work."""
        self._silent.update(self._sockets)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target_port))
            self._sockets += [near, far]
            self.accepted += 1
            for one, other in [(near, far), (far, near)]:
                threading.Thread(target=self._relay, args=(one, other), daemon=True).start()

    def _relay(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(1 << 16):
                if one not in self._silent:
                    other.sendall(data)
        except OSError:
            return
