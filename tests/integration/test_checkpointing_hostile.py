"""Broken, hostile and half-dead peers: a clear error, in time, and no memory for empty promises."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from torchft.checkpointing import HTTPTransport
from torchft.checkpointing.layout import MAGIC, PREFIX, TRAILER, VERSION
from torchft.checkpointing.snapshot import Snapshot
from torchft.errors import HealError

LONG = timedelta(seconds=30)
SHORT = timedelta(milliseconds=100)

Answer = Callable[[socket.socket], None]


@pytest.fixture
def healing() -> Iterator[HTTPTransport[Any]]:
    transport: HTTPTransport[Any] = HTTPTransport(LONG, 0, hostname="localhost")
    yield transport
    transport.shutdown()


class Peer:
    """A donor that answers every request with `answer`."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.metadata = f"http://127.0.0.1:{self._listener.getsockname()[1]}/checkpoint/"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(30)
                connection.recv(65536)
                self._answer(connection)


def says(*pieces: bytes) -> Answer:
    def answer(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)

    return answer


def ok(body: bytes, length: int | None = None) -> bytes:
    announced = len(body) if length is None else length
    return f"HTTP/1.1 200 OK\r\nContent-Length: {announced}\r\n\r\n".encode() + body


def sealed(fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields).encode()
    return PREFIX.pack(b"torchft\x00", 1, zlib.crc32(text), len(text)) + text


def header(*leaves: Any, step: int = 3, tree: Any = None) -> bytes:
    return sealed({"step": step, "window": "w", "tree": tree, "leaves": list(leaves)})


def honest(state: Any, step: int = 3) -> bytes:
    pieces: list[bytes] = []
    Snapshot(state, step).part(0, 1).write(lambda views: pieces.extend(bytes(v) for v in views))
    return b"".join(pieces)


STATE = {"w": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.bfloat16), "lr": 0.1}


def heal(healing: HTTPTransport[Any], answer: Answer, timeout: timedelta = LONG) -> Any:
    with Peer(answer) as peer:
        return healing.recv_checkpoint(0, peer.metadata, 3, timeout)


def test_the_honest_answer_is_accepted(healing: HTTPTransport[Any]) -> None:
    got = heal(healing, says(ok(honest(STATE))))
    assert torch.equal(got["w"], STATE["w"])  # type: ignore[arg-type]


GARBAGE: dict[str, tuple[bytes, str]] = {
    "not http": (b"\x80\x04\x95 this is a pickle" * 1000, "no HTTP"),
    "no status": (b"HTTP/1.1\r\n\r\n", "no HTTP"),
    "no length": (b"HTTP/1.1 200 OK\r\n\r\n" + honest(STATE), "no HTTP"),
    "empty answer": (b"", "closed the connection"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-", "closed the connection"),
    "refusal": (b"HTTP/1.1 400 Bad\r\nContent-Length: 4\r\n\r\nwhy?", r"refused \(400\): why\?"),
    "negative refusal": (b"HTTP/1.1 400 Bad\r\nContent-Length: -4\r\n\r\n", r"refused \(400\)"),
    "wrong magic": (ok(b"PK\x03\x04" + bytes(100)), "no torchft state"),
    "empty body": (ok(b""), "closed the connection"),
    "half a prefix": (ok(honest(STATE)[:10]), "closed the connection"),
    "huge header": (ok(PREFIX.pack(b"torchft\x00", 1, 0, 2**63)), "above the limit"),
    "half a header": (ok(honest(STATE)[:60]), "closed the connection"),
    "wrong step": (ok(honest(STATE, step=4)), "asked for step 3, the donor sent step 4"),
    "short length": (ok(honest(STATE), length=10), "the header makes .* the donor announced 10"),
    "negative length": (ok(honest(STATE), length=-1), "the donor announced -1"),
    "huge length": (ok(honest(STATE), length=1 << 62), "the donor announced"),
    "trailing nothing": (ok(honest(STATE)[:-4], length=len(honest(STATE))), "closed the conn"),
    "negative shape": (ok(header(["float32", [-5]])), "impossible shape"),
    "unknown dtype": (ok(header(["object", [5]])), "dtype 'object' is unknown"),
    "tree without its leaf": (
        ok(header(tree=["tensor", 0]) + TRAILER.pack(0)),
        "names the leaf 0",
    ),
    "tree with a stranger": (ok(header(tree=["os.system", "x"]) + TRAILER.pack(0)), "tree holds"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_a_heal_error_that_says_what_was_wrong(
    healing: HTTPTransport[Any], name: str
) -> None:
    answer, why = GARBAGE[name]
    with pytest.raises(HealError, match=rf"{why}.*healing to step 3 from replica rank 0"):
        heal(healing, says(answer))


@pytest.mark.parametrize("position", [-9, -500, -3000])
def test_a_flipped_bit_in_the_payload_is_noticed(
    healing: HTTPTransport[Any], position: int
) -> None:
    damaged = bytearray(honest(STATE))
    damaged[position] ^= 4
    with pytest.raises(HealError, match="checksum"):
        heal(healing, says(ok(bytes(damaged))))


@pytest.mark.parametrize("kept", [100, 1000, 4000])
def test_a_donor_that_dies_in_mid_transfer_is_an_error_at_once(
    healing: HTTPTransport[Any], kept: int
) -> None:
    with pytest.raises(HealError, match=r"closed the connection.*probably died"):
        heal(healing, says(ok(honest(STATE)[:kept], length=len(honest(STATE)))))


def test_a_donor_whose_connection_is_reset_is_an_error_at_once(
    healing: HTTPTransport[Any],
) -> None:
    def reset(connection: socket.socket) -> None:
        connection.sendall(ok(honest(STATE)[:1000], length=len(honest(STATE))))
        # Lingering for no time makes the close a reset, as a killed host's kernel would send it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with pytest.raises(HealError, match="probably died"):
        heal(healing, reset)


@pytest.mark.parametrize("kept", [0, 20, 60, 1000])
def test_a_donor_that_falls_silent_ends_at_the_deadline(
    healing: HTTPTransport[Any], kept: int
) -> None:
    released = threading.Event()

    def fall_silent(connection: socket.socket) -> None:
        whole = ok(honest(STATE))
        connection.sendall(whole[:kept])
        released.wait(30)

    try:
        with Peer(fall_silent) as peer, pytest.raises(TimeoutError, match=r"within 0\.1 s"):
            try:
                healing.recv_checkpoint(0, peer.metadata, 3, SHORT)
            finally:
                released.set()
    finally:
        released.set()


def test_a_donor_that_drips_ends_at_the_limit(healing: HTTPTransport[Any]) -> None:
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(ok(PREFIX.pack(MAGIC, VERSION, 0, 10_000_000), length=10_000_000))
        # A byte now and then keeps a timeout alive that is per byte, but not for ever.
        while not stop.wait(0.005):
            connection.sendall(b"t")

    with (
        Peer(drip) as peer,
        pytest.raises((TimeoutError, HealError), match=r"bytes in 1(\.0\d*)? s"),
    ):
        try:
            healing.recv_checkpoint(0, peer.metadata, 3, timedelta(seconds=0.1))
        finally:
            stop.set()


def test_declared_sizes_that_never_arrive_take_no_memory(healing: HTTPTransport[Any]) -> None:
    size = 4 << 30
    head = header(["uint8", [size]], tree=["tensor", 0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(HealError, match=r"closed the connection|asks for a block"):
        heal(healing, says(ok(head + bytes(1000), length=len(head) + size + TRAILER.size)))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 << 10


def test_a_size_that_no_machine_has_is_a_heal_error(healing: HTTPTransport[Any]) -> None:
    head = header(["uint8", [1 << 62]], tree=["tensor", 0])
    with pytest.raises(HealError, match="asks for a block"):
        heal(healing, says(ok(head, length=len(head) + (1 << 62) + TRAILER.size)))


def test_a_part_of_another_window_is_never_mixed_in() -> None:
    windows = iter([Snapshot(STATE, 3), Snapshot(STATE, 3)])
    part = iter([0, 1])

    def a_new_window_for_each_part(connection: socket.socket) -> None:
        pieces: list[bytes] = []
        next(windows).part(next(part), 2).write(lambda views: pieces.extend(map(bytes, views)))
        connection.sendall(ok(b"".join(pieces)))

    transport: HTTPTransport[Any] = HTTPTransport(LONG, 2, hostname="localhost")
    with (
        Peer(a_new_window_for_each_part) as peer,
        pytest.raises(HealError, match="state changed while it was being fetched"),
    ):
        transport.recv_checkpoint(0, peer.metadata, 3, LONG)
    transport.shutdown()


REQUESTS: dict[str, tuple[bytes, bytes]] = {
    "a browser": (b"GET / HTTP/1.1\r\n\r\n", b"404"),
    "another method": (b"POST /checkpoint/3/0-of-1 HTTP/1.1\r\n\r\n", b"404"),
    "a part that is not": (b"GET /checkpoint/3/1-of-1 HTTP/1.1\r\n\r\n", b"404"),
    "no part at all": (b"GET /checkpoint/3/0-of-0 HTTP/1.1\r\n\r\n", b"404"),
    "too many parts": (b"GET /checkpoint/3/0-of-999 HTTP/1.1\r\n\r\n", b"404"),
    "a way out": (b"GET /checkpoint/../../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"404"),
    "an endless head": (b"GET /checkpoint/3/0-of-1 HTTP/1.1\r\n" + b"x" * 10_000, b"404"),
    "an older step": (b"GET /checkpoint/2/0-of-1 HTTP/1.1\r\n\r\n", b"400"),
    "the right one": (b"GET /checkpoint/3/0-of-1 HTTP/1.1\r\n\r\n", b"200"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_donor_answers_any_request_and_lives_on(healing: HTTPTransport[Any], name: str) -> None:
    request, status = REQUESTS[name]
    donor = healing
    donor.send_checkpoint([1], 3, STATE, LONG)
    with socket.create_connection(("127.0.0.1", donor._server.port), 30) as stranger:
        stranger.sendall(request)
        assert stranger.recv(12) == b"HTTP/1.1 " + status
    got = donor.recv_checkpoint(0, donor.metadata(), 3, LONG)
    assert torch.equal(got["w"], STATE["w"])  # type: ignore[arg-type]
