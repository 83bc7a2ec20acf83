"""How averages and heals share a link with what must not wait: heartbeats, quorums and votes.

Bulk that fills a slow link fills the queue before it too, and a heartbeat then waits behind all of
that. Whoever carries bulk does two things, each of which helps where the other cannot:

- It marks its packets as bulk (TOS 8, which Linux calls `Maximize-Throughput`). A queue that sorts
  lets all other packets overtake them: Linux's default on the host and on routers, and many others.
- With `TORCHFT_CONGESTION=bbr` it does not fill the queue in the first place, whether that sorts or
  not. A kernel must have that module and allow it.

What carries control has no mark: it is as urgent as any other traffic, not more.
"""

from __future__ import annotations

import socket
import sys

from torchft import settings
from torchft.errors import SettingsError

__all__ = ["as_bulk", "check"]

_THROUGHPUT = 0x08  # IPTOS_THROUGHPUT; Linux sorts such packets into the last band of `pfifo_fast`
_LAST_BAND = 2  # TC_PRIO_BULK; IP_TOS sets it along, IPV6_TCLASS does not


def check() -> None:
    """See early that connections can be made so.

    Raises:
        SettingsError: the kernel does not have or allow what `TORCHFT_CONGESTION` names.
    """
    with socket.socket() as probe:
        as_bulk(probe)


def as_bulk(connection: socket.socket) -> None:
    """Mark what this TCP connection sends from now on.

    Raises:
        SettingsError: as `check`.
        OSError: the connection is gone.
    """
    if connection.family == socket.AF_INET6:
        connection.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _THROUGHPUT)
    if connection.family == socket.AF_INET or _carries_ipv4(connection):
        connection.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _THROUGHPUT)
    if sys.platform == "linux":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, _LAST_BAND)
    if (name := settings.text(settings.CONGESTION)) is not None:
        _control(connection, name)


def _carries_ipv4(connection: socket.socket) -> bool:
    """An IPv6 socket of both kinds, whose peer has come by IPv4."""
    try:
        return str(connection.getpeername()[0]).startswith("::ffff:")
    except OSError:  # not connected
        return False


def _control(connection: socket.socket, name: str) -> None:
    if not hasattr(socket, "TCP_CONGESTION"):
        raise SettingsError(f"{settings.CONGESTION}={name!r}: only Linux can choose: unset it")
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    except (FileNotFoundError, PermissionError) as error:
        raise SettingsError(
            f"{settings.CONGESTION}={name!r}: {error.strerror}. The kernel lists what it has in "
            "/proc/sys/net/ipv4/tcp_available_congestion_control and what others than root may "
            "choose in tcp_allowed_congestion_control: add it there (`modprobe tcp_bbr`), or unset "
            "the variable"
        ) from error
