"""A connected socket on which every call ends: by success, by the peer's end, or by the deadline.

On Linux the kernel keeps the time (SO_RCVTIMEO, SO_SNDTIMEO), so that one call moves megabytes
without coming back to Python: a donor serves while its training thread holds the GIL most of the
time. Elsewhere Python's own socket timeouts do the same with more calls.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from torchft.checkpointing.transport import longest_s
from torchft.errors import TransferTimeoutError

__all__ = ["Deadline", "PeerGone", "ProgressDeadline", "Stream", "connect"]

_KERNEL_TIMEOUTS = sys.platform == "linux"
_MAX_VIEWS = 512  # Half of what one sendmsg takes (IOV_MAX).
_MAX_HEAD_BYTES = 8192


class PeerGone(ConnectionError):
    """The other end closed the connection before it had sent what it promised."""


class Deadline:
    """A moment that lies `seconds` after its creation."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._at = clock() + seconds

    def remaining(self) -> float:
        """Seconds that are left, more than 0.

        Raises:
            TimeoutError: no time is left.
        """
        left = self._at - self._clock()
        if left <= 0:
            raise TimeoutError(f"not done within {self.seconds:g} s")
        return left

    @property
    def look_s(self) -> float:
        """At least so often one must look what has arrived of a large piece, in seconds."""
        return math.inf

    def moved(self, nbytes: int) -> None:
        """Bytes that move do not change it."""


class ProgressDeadline(Deadline):
    """Moves on with every byte: `seconds` from the last one, and in all what `longest_s` allows."""

    def __init__(
        self, seconds: float, limit_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(seconds, clock)
        self.nbytes = 0
        """How many bytes have moved."""
        self._limit_s = limit_s
        self._began = clock()
        self.moved(0)

    @property
    def look_s(self) -> float:
        """An eighth of the time between two bytes."""
        return self.seconds / 8

    def moved(self, nbytes: int) -> None:
        """So many more bytes have moved."""
        self.nbytes += nbytes
        self._at = min(self._clock() + self.seconds, self._began + self._longest_s)

    @property
    def _longest_s(self) -> float:
        return longest_s(self._limit_s, self.nbytes)

    def remaining(self) -> float:
        """Seconds that are left, more than 0.

        Raises:
            TransferTimeoutError: no time is left; says how many bytes have moved.
        """
        if self._clock() >= self._began + self._longest_s:
            raise TransferTimeoutError(
                f"timed out: {self.nbytes} bytes in {self._longest_s:g} s, and not done"
            )
        try:
            return super().remaining()
        except TimeoutError:
            waited = f"timed out: no byte within {self.seconds:g} s, after {self.nbytes}"
            raise TransferTimeoutError(waited) from None


class Stream:
    """Whole reads and writes on `connection`, each until `deadline`, which may be replaced."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self.deadline = deadline
        self._socket = connection
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if _KERNEL_TIMEOUTS:
            self._socket.settimeout(None)

    def read_into(self, memory: memoryview) -> None:
        """Fill `memory`.

        Raises:
            PeerGone: the peer closed before that.
            TimeoutError: the deadline passed.
            OSError: the connection broke.
        """
        while memory:
            memory = memory[self._recv_into(memory, socket.MSG_WAITALL) :]

    def read(self, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes; raises as `read_into`."""
        buffer = bytearray(nbytes)
        self.read_into(memoryview(buffer))
        return bytes(buffer)

    def read_head(self) -> str:
        """The lines of an HTTP head, up to its empty line and not a byte further.

        Raises as `read_into`, and ValueError when there is no end to it in 8 KiB.
        """
        head = bytearray()
        piece = memoryview(bytearray(_MAX_HEAD_BYTES))
        while len(head) < _MAX_HEAD_BYTES:
            seen = self._recv_into(piece, socket.MSG_PEEK)
            end = (head + piece[:seen]).find(b"\r\n\r\n")
            take = seen if end < 0 else end + 4 - len(head)
            self.read_into(piece[:take])
            head += piece[:take]
            if end >= 0:
                return head.decode("latin-1")
        raise ValueError(f"no HTTP: no empty line within {_MAX_HEAD_BYTES} bytes")

    def send(self, views: Sequence[memoryview | bytes]) -> None:
        """Hand all of `views` to the kernel. Raises TimeoutError or OSError as `read_into`."""
        for first in range(0, len(views), _MAX_VIEWS):
            batch = [memoryview(view) for view in views[first : first + _MAX_VIEWS]]
            sent = self._send_some(batch)
            while batch:
                while batch and sent >= len(batch[0]):
                    sent -= len(batch.pop(0))
                if batch:
                    batch[0] = batch[0][sent:]
                    sent = self._send_some(batch)

    def cut(self) -> None:
        """End every call that is under way on this socket, from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; closing twice does no harm."""
        self._socket.close()

    def _recv_into(self, memory: memoryview, flags: int) -> int:
        while True:
            self._arm("SO_RCVTIMEO")
            with _looking_again():
                received = self._socket.recv_into(memory, 0, flags)
                break
        if received == 0:
            raise PeerGone("the peer closed the connection")
        if not flags & socket.MSG_PEEK:
            self.deadline.moved(received)
        return received

    def _send_some(self, views: Sequence[memoryview]) -> int:
        while True:
            self._arm("SO_SNDTIMEO")
            with _looking_again():
                sent = self._socket.sendmsg(views)
                self.deadline.moved(sent)
                return sent

    def _arm(self, option: str) -> None:
        """Let the next call end by the deadline. Raises TimeoutError when it has passed."""
        left = min(self.deadline.remaining(), self.deadline.look_s)
        if not _KERNEL_TIMEOUTS:
            self._socket.settimeout(left)
            return
        fraction, whole = math.modf(left)
        # Zero would mean no timeout at all.
        interval = struct.pack("ll", int(whole), max(1, int(fraction * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, getattr(socket, option), interval)


@contextlib.contextmanager
def _looking_again() -> Iterator[None]:
    """Nothing has moved for as long as was armed: that is for the deadline to judge."""
    try:
        yield
    except BlockingIOError:
        pass
    except TimeoutError as error:
        if error.errno is not None:  # the kernel gave the connection up
            raise


def connect(host: str, port: int, deadline: Deadline) -> Stream:
    """Connect to the first address of `host` that answers, IPv6 or IPv4.

    Raises:
        OSError: none does; TimeoutError at the deadline.
    """
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(deadline.remaining())
            connection.connect(address)
            return Stream(connection, deadline)
        except OSError as error:
            connection.close()
            failure = error
    raise failure
