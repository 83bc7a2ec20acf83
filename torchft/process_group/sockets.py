"""Which descriptors are a process group's own, and how they are cut.

A pending gloo operation ends at once when its connections are shut down; nothing else ends it. So
a group must know its sockets and no others: another thread may open connections at the same time.
A pair of gloo's is recognised by its address, not by when it appeared: its local end is this
group's listening address, or its remote end is the listening address of a peer of this group.

Gloo closes some sockets by itself, and the number may by then be another file's. So each is
remembered with its inode, and is duplicated before the inode is compared: what we then shut down
cannot be swapped under us. The listening socket is never touched (gloo's accept loop would abort
the process), nor is the store's.

Linux only: elsewhere nothing is found here and a retired group just waits for its operations.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TypeVar

from torchft.errors import CollectiveError

__all__ = [
    "Address",
    "OwnSocket",
    "connected",
    "connects_to",
    "cut",
    "descriptors_left",
    "each",
    "is_open",
    "listening",
    "no_descriptors",
    "visible",
]

T = TypeVar("T")
Address = tuple[str, int]
"""Numeric host and port."""

_DESCRIPTORS = "/proc/self/fd"
_opening = threading.Lock()
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class OwnSocket:
    """A connected socket of one process group."""

    descriptor: int
    inode: int


def visible() -> bool:
    """Whether this system lets a process list its own sockets."""
    return sys.platform == "linux" and os.path.isdir(_DESCRIPTORS)


def listening(open_device: Callable[[], T]) -> tuple[T, Address | None]:
    """Call `open_device` and find the address on which what it opened listens; None: cannot tell.

    Another thread may begin to listen in the same moment. Then two are new and neither is sure to
    be ours, so we try again with a fresh device.
    """
    if not visible():
        return open_device(), None
    for _ in range(_ATTEMPTS):
        with _opening:
            before = {own.inode for own in _sockets()}
            device = open_device()
            new = [own for own in _sockets() if own.inode not in before]
        found = [address for own in new if (address := _listens(own)) is not None]
        if len(found) == 1:
            return device, found[0]
    return device, None


def connects_to(own: Address, peer: Address) -> bool:
    """Whether gloo lets the listener at `own` connect to the one at `peer`, and not the reverse.

    The greater address connects: first by the bytes of the host, then by the port as it stands in
    memory, in network order.
    """
    return _order(own) > _order(peer)


def connected(own: Address, peers: Collection[Address]) -> tuple[OwnSocket, ...]:
    """The sockets that join the listener at `own` to the listeners at `peers`.

    A peer to which several connections lead is left out: with several members in one process one
    cannot tell whose they are, and cutting a stranger's is worse than waiting for ours.
    """
    accepted: list[OwnSocket] = []
    made: dict[Address, list[OwnSocket]] = {peer: [] for peer in peers if connects_to(own, peer)}
    for candidate in _sockets():
        ends = _ends(candidate)
        if ends is None:
            continue
        here, there = ends
        if here == own:
            accepted.append(candidate)
        elif there in made:
            made[there].append(candidate)
    return (*accepted, *(found[0] for found in made.values() if len(found) == 1))


def cut(sockets: Collection[OwnSocket]) -> None:
    """Shut down both directions of each that is still what it was."""
    each(sockets, lambda one: one.shutdown(socket.SHUT_RDWR))


def each(sockets: Collection[OwnSocket], act: Callable[[socket.socket], object]) -> None:
    """`act` on each that is still what it was; one that ends meanwhile is passed over."""
    for own in sockets:
        with suppress(OSError), closing(_duplicate(own)) as twin:
            act(twin)


def is_open(own: OwnSocket) -> bool:
    """Whether gloo has not closed it yet. It closes a connection that its peer has ended."""
    try:
        return os.fstat(own.descriptor).st_ino == own.inode
    except OSError:
        return False


def descriptors_left() -> bool:
    """Whether this process can open another file or socket."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno not in (errno.EMFILE, errno.ENFILE)
    return True


def no_descriptors() -> CollectiveError:
    """What a process is told that has run out of them."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return CollectiveError(
        f"this process has all of its {most} descriptors open, so no connection can be made: raise "
        "`ulimit -n`, or look in /proc/self/fd at what it keeps open"
    )


def _sockets() -> Iterator[OwnSocket]:
    try:
        names = os.listdir(_DESCRIPTORS)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise no_descriptors() from error
        raise
    for name in names:
        with suppress(OSError):  # closed meanwhile; the listing's own is always gone by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield OwnSocket(int(name), status.st_ino)


def _duplicate(own: OwnSocket) -> socket.socket:
    """The same open socket under a number of our own. OSError: it is gone or another by now."""
    descriptor = os.dup(own.descriptor)
    try:
        if os.fstat(descriptor).st_ino != own.inode:
            raise OSError(f"descriptor {own.descriptor} is another file by now")
        return socket.socket(fileno=descriptor)
    except OSError:
        os.close(descriptor)
        raise


def _listens(own: OwnSocket) -> Address | None:
    with suppress(OSError), closing(_duplicate(own)) as twin:
        if _is_tcp(twin) and twin.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return _address(twin.getsockname())
    return None


def _ends(own: OwnSocket) -> tuple[Address, Address] | None:
    with suppress(OSError), closing(_duplicate(own)) as twin:
        if _is_tcp(twin):
            return _address(twin.getsockname()), _address(twin.getpeername())
    return None


def _order(address: Address) -> tuple[bytes, int]:
    host, port = address
    return ip_address(host).packed, int.from_bytes(port.to_bytes(2, "big"), sys.byteorder)


def _is_tcp(one: socket.socket) -> bool:
    return one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM


def _address(name: tuple) -> Address:
    host = str(name[0]).split("%")[0]
    return host.removeprefix("::ffff:"), int(name[1])
