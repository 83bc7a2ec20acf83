"""The floor of a synchronisation: plain sockets that move the same bytes to a hub and back.

Memory is taken and touched once; nothing is looked at, copied or kept.
"""

from __future__ import annotations

import socket
import threading
import time
from multiprocessing.connection import Connection

from harness.serving import Pace

__all__ = ["hub", "leaf"]


def hub(line: Connection, *, leaves: int, nbytes: int) -> None:
    """A worker's function: sends its port; when all leaves have sent, all are answered. Serves
    until the leaves hang up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        line.send(listener.getsockname()[1])
        peers = [listener.accept()[0] for _ in range(leaves)]
    all_here = threading.Barrier(leaves)
    threads = [
        threading.Thread(target=_answer, args=(peer, all_here, nbytes), daemon=True)
        for peer in peers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _answer(peer: socket.socket, all_here: threading.Barrier, nbytes: int) -> None:
    memory = memoryview(bytearray(nbytes))
    with peer:
        while _fill(peer, memory):
            all_here.wait()
            peer.sendall(memory)


def leaf(line: Connection, *, port: int, nbytes: int) -> None:
    """A worker's function: sends and receives `nbytes` whenever it is sent a word, and sends the
    Pace of it; ends at None."""
    memory = memoryview(bytearray(nbytes))
    with socket.create_connection(("127.0.0.1", port)) as peer:
        line.send(port)
        while line.recv() is not None:
            began = time.monotonic()
            peer.sendall(memory)
            if not _fill(peer, memory):
                raise ConnectionError("the hub hung up")
            line.send(Pace(began, time.monotonic()))


def _fill(peer: socket.socket, memory: memoryview) -> bool:
    """False: the peer hung up between two rounds."""
    at = 0
    while at < len(memory):
        count = peer.recv_into(memory[at:])
        if not count and at:
            raise ConnectionError("the peer hung up within a round")
        if not count:
            return False
        at += count
    return True
