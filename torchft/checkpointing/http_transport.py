"""Healing over plain TCP connections that speak HTTP: the transport that every set-up has.

The donor serves its state from where it lies, the healing group reads it into fresh memory, and
nothing that arrives is unpickled (`layout.py`). With `num_chunks` n the state is fetched over n
connections at a time, which is faster wherever one connection does not fill the network.

Proxies named in the environment are not used: peers are reached directly.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from torchft.arguments import check_integer, check_number
from torchft.checkpointing.download import Address, Download
from torchft.checkpointing.server import MAX_PARTS, SnapshotServer
from torchft.checkpointing.snapshot import Snapshot
from torchft.checkpointing.stream import ProgressDeadline
from torchft.checkpointing.transport import LIMIT, CheckpointTransport
from torchft.checkpointing.window import Window
from torchft.errors import DonorRefusedError, HealError, PhaseError, TransferTimeoutError

__all__ = ["HTTPTransport"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class HTTPTransport(CheckpointTransport[T]):
    """Serves and fetches state dicts.

    Args:
        timeout: bounds each wait of the donor: of a request for the window to open, of one piece
            of a transfer, and of `disallow_checkpoint` for downloads that are under way.
        num_chunks: how many connections this process fetches with at a time; 0 and 1 mean one.
        hostname: what peers are told to connect to. Default: this host's name if it resolves.

    Raises:
        SettingsError: `num_chunks` is negative or above 256, or `timeout` is not positive.
    """

    def __init__(self, timeout: timedelta, num_chunks: int, *, hostname: str | None = None) -> None:
        check_integer("num_chunks", num_chunks, least=0, most=MAX_PARTS)
        check_number("timeout", timeout.total_seconds(), above=0)
        self._timeout_s = timeout.total_seconds()
        self._parts = max(1, num_chunks)
        self._hostname = hostname if hostname is not None else _resolvable_hostname()
        self._bytes_received = 0
        self._download: ProgressDeadline | None = None
        self._window: Window[Snapshot] = Window()
        self._server = SnapshotServer(self._window, timeout_s=self._timeout_s)

    @property
    def bytes_sent(self) -> int:  # type: ignore[override]
        """Bytes of state handed to the wire, headers included."""
        return self._server.bytes_sent

    @property
    def bytes_received(self) -> int:  # type: ignore[override]
        """Bytes of state read from the wire, headers included: in complete downloads, and in the
        one that is under way."""
        under_way = self._download
        return self._bytes_received + (under_way.nbytes if under_way is not None else 0)

    def metadata(self) -> str:
        """The address for peers to fetch from: `http://{hostname}:{port}/checkpoint/`."""
        host = f"[{self._hostname}]" if ":" in self._hostname else self._hostname
        return f"http://{host}:{self._server.port}/checkpoint/"

    def send_checkpoint(
        self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta
    ) -> None:
        """Open the window on `state_dict`. Tensors of accelerators are copied to the CPU first.

        Tensors on the CPU are not copied. Bytes move when the peers ask, in threads of their own.
        """
        self.disallow_checkpoint()
        snapshot = Snapshot(state_dict, step)
        self._window.open(step, snapshot)

    def check_state(self, state_dict: T) -> None:
        """See that the state can be encoded; raises TypeError or ValueError with the place."""
        Snapshot.check(state_dict)

    def refuse_checkpoint(
        self, dst_ranks: list[int], step: int, reason: str, timeout: timedelta
    ) -> None:
        """Answer whoever asks for the state of `step` with `reason`."""
        self.disallow_checkpoint()
        self._window.refuse(step, reason)

    def allow_checkpoint(self, step: int) -> None:
        """Let the state that is offered now count as that of `step`.

        Raises:
            PhaseError: the window is closed. A closed window keeps no state.
        """
        if not self._window.relabel(step):
            raise PhaseError("no state is offered: call send_checkpoint, which opens the window")

    def disallow_checkpoint(self) -> None:
        """Close the window: wait for downloads that are under way, then cut them. Never raises."""
        cut = self._window.close(self._timeout_s)
        if cut:
            logger.warning(
                "cut %d downloads that were not done %g s after the step was decided; those groups "
                "will heal again: raise the transport's timeout if the network is that slow",
                cut,
                self._timeout_s,
            )

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> T:
        """Fetch the state of `step` from the donor at `metadata`. Tensors arrive on the CPU."""
        seconds = timeout.total_seconds()
        deadline = ProgressDeadline(seconds, LIMIT * seconds)
        download = Download(_parse(metadata), step, self._parts, deadline)
        self._download = deadline
        try:
            with _named(f"healing to step {step} from replica rank {src_rank} at {metadata}"):
                state: Any = download.run()
        finally:
            self._download = None
        self._bytes_received += download.bytes_received
        return state

    def shutdown(self, wait: bool = True) -> None:
        """Close the port and cut every download. Calling it twice is fine."""
        self._server.shutdown(wait)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Say in every error what was tried, after its cause, and which kind it is."""
    try:
        yield
    except TimeoutError as error:
        raise TransferTimeoutError(f"{error}, {what}") from error
    except DonorRefusedError as error:
        raise DonorRefusedError(f"{error}, {what}", error.code) from error
    except HealError as error:
        raise HealError(f"{error}, {what}") from error
    except OSError as error:
        raise HealError(
            f"{error or type(error).__name__} (the donor has probably died), {what}"
        ) from error


def _parse(metadata: str) -> Address:
    try:
        url = urlsplit(metadata)
        if url.scheme == "http" and url.hostname and url.port and url.path.endswith("/"):
            return Address(url.hostname, url.port, url.path)
    except ValueError:
        pass
    raise HealError(
        f"the donor's checkpoint address is {metadata!r}, not http://host:port/checkpoint/: "
        "do all groups use the same checkpoint transport?"
    )


def _resolvable_hostname() -> str:
    """This host's name, or an address of its own when the name means nothing to the resolver."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:
        address = _own_address()
        logger.warning(
            "this host's name %r does not resolve: healing peers are told %s instead; "
            "name a reachable one with HTTPTransport(hostname=...)",
            name,
            address,
        )
        return address


def _own_address() -> str:
    """The address of the interface that leads out; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
