"""What the machine itself takes: the least that any implementation could."""

from __future__ import annotations

import socket
import subprocess
from contextlib import closing
from datetime import timedelta
from multiprocessing.connection import Connection

from harness.spread import Spread, repeat
from harness.workers import Worker

__all__ = ["heartbeat_ms", "spawn_process_s", "tcp_round_trip_us"]

_WARM_UP = 0.1  # this part of the round trips is not counted
_NEXT_TO_NOTHING = ["/bin/true"]


def tcp_round_trip_us(times: int = 2000, size: int = 64) -> Spread:
    """Microseconds there and back between two processes over a loopback connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        with Worker(_echo, port=server.getsockname()[1]):
            peer, _ = server.accept()
            with closing(peer):
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                trips = repeat(times, lambda: _there_and_back(peer, b"x" * size))
    return Spread.of(trips[int(times * _WARM_UP) :], scale=1e6)


def _there_and_back(peer: socket.socket, message: bytes) -> None:
    peer.sendall(message)
    peer.recv(4096)


def heartbeat_ms(address: str, times: int = 300) -> Spread:
    """Milliseconds of one call to the lighthouse at `address` that asks for nothing."""
    from torchft.coordination import LighthouseClient

    client = LighthouseClient(address, connect_timeout=timedelta(seconds=10))
    return Spread.of(repeat(times, lambda: client.heartbeat("floor")), scale=1e3)


def spawn_process_s(times: int = 5) -> Spread:
    """Seconds to start and end a process that does nothing."""
    return Spread.of(repeat(times, lambda: subprocess.run(_NEXT_TO_NOTHING, check=True)))


def _echo(line: Connection, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := peer.recv(4096):
            peer.sendall(data)
