"""Bulk says that it is bulk, and what a kernel cannot do is said before anything is sent."""

from __future__ import annotations

import socket
import sys
from datetime import timedelta

import pytest

from torchft.errors import SettingsError
from torchft.process_group import ProcessGroupGloo
from torchft.process_group.bulk import as_bulk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the options are Linux's")


def _tos(connection: socket.socket) -> int:
    return connection.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) & 0xFC


def test_packets_of_an_ipv4_connection_can_be_overtaken() -> None:
    with socket.socket() as connection:
        as_bulk(connection)
        assert _tos(connection) == 8
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 2


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this host has no IPv6")
def test_one_that_came_by_ipv4_to_an_ipv6_socket_is_marked_in_both_ways() -> None:
    """On such a socket the IPv6 option alone marks nothing."""
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with listener, socket.create_connection(("127.0.0.1", listener.getsockname()[1])):
        came, _ = listener.accept()
        with came:
            as_bulk(came)
            assert _tos(came) == 8
            assert came.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS) == 8
            assert came.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 2


def test_a_congestion_control_of_choice_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_CONGESTION", "reno")  # every Linux has it and allows it
    with socket.socket() as connection:
        as_bulk(connection)
        name = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert name.rstrip(b"\0") == b"reno"


def test_one_that_the_kernel_lacks_is_named_at_birth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHFT_CONGESTION", "carrier-pigeon")
    with pytest.raises(SettingsError, match=r"TORCHFT_CONGESTION='carrier-p.*unset the variable"):
        ProcessGroupGloo(timedelta(seconds=1))
