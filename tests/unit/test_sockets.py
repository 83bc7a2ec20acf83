"""Which of two listeners gloo lets connect to the other."""

from __future__ import annotations

import sys

import pytest

from torchft.process_group.sockets import connects_to


@pytest.mark.parametrize(
    "own, peer",
    [
        (("10.0.0.2", 1), ("10.0.0.1", 2)),  # hosts come before ports
        (("10.0.0.10", 1), ("10.0.0.9", 1)),  # as numbers, not as text
        (("::2", 1), ("::1", 2)),
    ],
)
def test_the_greater_host_connects(own, peer) -> None:
    assert connects_to(own, peer)
    assert not connects_to(peer, own)


@pytest.mark.skipif(sys.byteorder == "big", reason="there a port is in order as it is")
def test_the_ports_of_one_host_are_compared_as_they_stand_in_memory() -> None:
    assert connects_to(("127.0.0.1", 0x0002), ("127.0.0.1", 0x0101))
    assert not connects_to(("127.0.0.1", 0x0101), ("127.0.0.1", 0x0002))
