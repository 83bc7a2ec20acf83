"""The donor's side: a small HTTP server that offers one snapshot at a time.

    GET /checkpoint/{step}/{part}-of-{parts}    one part of the state, `layout.py`

200 with the part, 400 when another step is offered, 500 when the state cannot be read, 503 when
none is offered in time, 404 for all else.
Each connection carries one request and has a thread of its own, which ends with the connection.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import weakref
from dataclasses import dataclass

from torchft.checkpointing.snapshot import Snapshot
from torchft.checkpointing.stream import Deadline, ProgressDeadline, Stream
from torchft.checkpointing.transport import LIMIT
from torchft.checkpointing.window import Refused, Unreadable, Window, WrongStep
from torchft.process_group.bulk import as_bulk

__all__ = ["MAX_PARTS", "SnapshotServer"]

logger = logging.getLogger(__name__)

MAX_PARTS = 256
_MAX_CONNECTIONS = 512
_REQUEST_TIMEOUT_S = 10.0
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_PATH = re.compile(r"GET /checkpoint/(-?\d{1,19})/(\d{1,3})-of-(\d{1,3}) HTTP/1\.[01]")


class _BadRequest(Exception):
    """No request that this server knows."""


@dataclass(frozen=True)
class _Request:
    step: int
    part: int
    parts: int

    @classmethod
    def parse(cls, head: str) -> _Request:
        match = _PATH.fullmatch(head.partition("\r\n")[0])
        if match is None:
            raise _BadRequest("ask for /checkpoint/{step}/{part}-of-{parts}")
        step, part, parts = (int(group) for group in match.groups())
        if not 0 <= part < parts <= MAX_PARTS:
            raise _BadRequest(f"no part {part} of {parts}; there are at most {MAX_PARTS} parts")
        return cls(step, part, parts)


class SnapshotServer:
    """Serves what `window` offers, on a port of the system's choice, until `shutdown`.

    `timeout_s` bounds how long a request waits for the window to open, and how long one piece of
    the transfer may take.
    """

    def __init__(self, window: Window[Snapshot], *, timeout_s: float) -> None:
        self.bytes_sent = 0
        self._window = window
        self._timeout_s = timeout_s
        self._listener = _listen()
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()  # guards the fields below, and bytes_sent
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._stopping = False
        self._acceptor = threading.Thread(target=self._accept, name="heal-accept", daemon=True)
        self._acceptor.start()
        _servers.add(self)

    def shutdown(self, wait: bool) -> None:
        """Close the port and every connection; with `wait`, also see the threads end."""
        with self._lock:
            first, self._stopping = not self._stopping, True
        if first:
            self._window.shut()
            _wake(self._listener)
            self._listener.close()
        if wait:
            self._acceptor.join(_REQUEST_TIMEOUT_S)
            self._end_connections()

    def _end_connections(self) -> None:
        with self._lock:
            connections = dict(self._connections)
        for connection, thread in connections.items():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(_REQUEST_TIMEOUT_S)

    def _accept(self) -> None:
        while not self._stopping:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._stopping:
                    logger.error("healing peers cannot reach this process any more: %s", error)
                return
            self._start(connection)

    def _start(self, connection: socket.socket) -> None:
        thread = threading.Thread(
            target=self._serve, args=(connection,), name="heal-serve", daemon=True
        )
        with self._lock:
            if self._stopping or len(self._connections) >= _MAX_CONNECTIONS:
                connection.close()
                return
            self._connections[connection] = thread
        thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            as_bulk(connection)
            stream = Stream(connection, Deadline(_REQUEST_TIMEOUT_S))
            self._answer(stream)
        except OSError as error:
            # The healing peer left, was cut, or took too long: its side reports the step's error.
            logger.info("a healing peer did not get all of the state: %s", error)
        except Exception:
            logger.exception("serving a healing peer failed")
        finally:
            connection.close()
            with self._lock:
                self._connections.pop(connection, None)

    def _answer(self, stream: Stream) -> None:
        try:
            request = _Request.parse(stream.read_head())
            with self._window.lease(
                request.step, timeout_s=self._timeout_s, cut=stream.cut
            ) as snapshot:
                self._send_part(stream, snapshot, request)
        except (_BadRequest, ValueError) as error:
            self._say(stream, 404, str(error))
        except WrongStep as refusal:
            self._say(stream, 400, f"invalid checkpoint requested: {refusal}")
        except Unreadable as refusal:
            self._say(stream, 500, str(refusal))
        except Refused as refusal:
            self._say(stream, 503, str(refusal))

    def _send_part(self, stream: Stream, snapshot: Snapshot, request: _Request) -> None:
        part = snapshot.part(request.part, request.parts)
        stream.deadline = ProgressDeadline(self._timeout_s, LIMIT * self._timeout_s)
        stream.send([_head(200, "application/octet-stream", part.nbytes)])

        def send(piece: list[memoryview | bytes]) -> None:
            stream.send(piece)
            with self._lock:
                self.bytes_sent += sum(len(view) for view in piece)

        part.write(send)

    def _say(self, stream: Stream, status: int, text: str) -> None:
        stream.deadline = Deadline(_REQUEST_TIMEOUT_S)
        body = text.encode()
        stream.send([_head(status, "text/plain; charset=utf-8", len(body)), body])


def _head(status: int, kind: str, length: int) -> bytes:
    return (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    ).encode()


def _listen() -> socket.socket:
    """A listening socket for IPv6 and IPv4, or for IPv4 alone on a host without IPv6."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("0.0.0.0", 0))


def _wake(listener: socket.socket) -> None:
    """End a blocked `accept`: Linux returns from it at once, elsewhere closing does."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)


_servers: weakref.WeakSet[SnapshotServer] = weakref.WeakSet()


def _close_inherited_sockets() -> None:
    """In a forked child: a copy of a connection would keep it open after the donor's death."""
    for server in _servers:
        server._listener.close()
        for connection in list(server._connections):
            connection.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited_sockets)
