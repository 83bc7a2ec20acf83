"""Donor and healing group over real sockets on the loopback."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

from torchft.checkpointing import CheckpointTransport, HTTPTransport
from torchft.checkpointing import http_transport as http_module
from torchft.checkpointing.layout import BLOCK_BYTES
from torchft.errors import HealError, PhaseError, SettingsError

LONG = timedelta(seconds=30)
SHORT = timedelta(milliseconds=50)

Make = Callable[..., HTTPTransport[Any]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[HTTPTransport[Any]] = []

    def transport(timeout: timedelta = LONG, num_chunks: int = 0) -> HTTPTransport[Any]:
        made.append(HTTPTransport(timeout, num_chunks, hostname="localhost"))
        return made[-1]

    yield transport
    for each in made:
        each.shutdown()


def some_state(fill: float = 1.0) -> dict[str, Any]:
    tensors = {f"layer{i}": torch.full((i, 7), fill + i) for i in range(20)}
    return {"user": {"default": {**tensors, "lr": 0.1}}, "torchft": {"step": 3}}


def assert_same(got: dict[str, Any], sent: dict[str, Any]) -> None:
    assert got["torchft"] == sent["torchft"]
    user, expected = got["user"]["default"], sent["user"]["default"]
    assert list(user) == list(expected)
    for key, value in expected.items():
        assert torch.equal(torch.as_tensor(user[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("donor_chunks", [0, 3])
@pytest.mark.parametrize("chunks", [0, 1, 2, 40])
def test_a_state_arrives_whole_over_any_number_of_connections(
    make: Make, chunks: int, donor_chunks: int
) -> None:
    donor, healing = make(num_chunks=donor_chunks), make(num_chunks=chunks)
    donor.send_checkpoint([1], 3, some_state(), LONG)
    assert_same(healing.recv_checkpoint(0, donor.metadata(), 3, LONG), some_state())


@pytest.mark.parametrize("chunks", [0, 3])
def test_leaves_larger_than_a_block_and_a_slice_arrive(make: Make, chunks: int) -> None:
    sent = [torch.arange(BLOCK_BYTES // 4 + 3, dtype=torch.int32), torch.arange(5), "end"]
    donor, healing = make(), make(num_chunks=chunks)
    donor.send_checkpoint([1], 0, sent, LONG)
    got = healing.recv_checkpoint(0, donor.metadata(), 0, LONG)
    assert torch.equal(got[0], sent[0])  # type: ignore[arg-type]
    assert torch.equal(got[1], sent[1])  # type: ignore[arg-type]
    assert got[2] == "end"


def test_an_empty_state_arrives(make: Make) -> None:
    donor = make()
    donor.send_checkpoint([1], 0, {}, LONG)
    assert make(num_chunks=2).recv_checkpoint(0, donor.metadata(), 0, LONG) == {}


def test_metadata_is_the_address_of_the_checkpoint(make: Make) -> None:
    donor = make()
    assert donor.metadata() == f"http://localhost:{donor._server.port}/checkpoint/"


def test_a_wrong_step_names_both_steps_and_the_donor(make: Make) -> None:
    donor = make()
    donor.send_checkpoint([1], 3, some_state(), LONG)
    says = r"serving 3 but got step=2.*step 2 from replica rank 5"
    with pytest.raises(HealError, match=says):
        make().recv_checkpoint(5, donor.metadata(), 2, LONG)


def test_one_who_asks_before_the_window_opens_waits_for_it(make: Make) -> None:
    donor, healing = make(), make()
    asked = threading.Event()
    got: list[Any] = []

    def heal() -> None:
        asked.set()
        got.append(healing.recv_checkpoint(0, donor.metadata(), 3, LONG))

    thread = threading.Thread(target=heal)
    thread.start()
    assert asked.wait(30)
    donor.send_checkpoint([1], 3, some_state(), LONG)
    thread.join(30)
    assert_same(got[0], some_state())


def test_the_healing_peers_own_deadline_holds_while_the_window_is_closed(make: Make) -> None:
    donor = make()
    with pytest.raises(TimeoutError, match=r"no byte within 0\.05 s.* healing to step 3"):
        make().recv_checkpoint(0, donor.metadata(), 3, SHORT)


def test_the_donors_deadline_ends_a_wait_for_the_window(make: Make) -> None:
    donor = make(timeout=SHORT)
    with pytest.raises(HealError, match=r"503.*no state within 0\.05 s"):
        make().recv_checkpoint(0, donor.metadata(), 3, LONG)


def test_after_disallow_the_state_is_not_served(make: Make) -> None:
    donor = make()
    donor.send_checkpoint([1], 3, some_state(), LONG)
    donor.disallow_checkpoint()
    with pytest.raises(TimeoutError):
        make().recv_checkpoint(0, donor.metadata(), 3, SHORT)


def test_disallow_without_a_window_and_twice_is_fine(make: Make) -> None:
    donor = make()
    donor.disallow_checkpoint()
    donor.disallow_checkpoint()


def test_each_window_serves_its_own_state(make: Make) -> None:
    donor, healing = make(), make(num_chunks=2)
    for step in range(3):
        donor.send_checkpoint([1], step, some_state(step), LONG)
        got = healing.recv_checkpoint(0, donor.metadata(), step, LONG)
        assert_same(got, some_state(step))
        donor.disallow_checkpoint()


def test_cpu_tensors_are_not_copied_by_send(make: Make) -> None:
    donor = make()
    weight = torch.zeros(3)
    donor.send_checkpoint([1], 0, weight, LONG)
    weight.fill_(5)  # Forbidden to a user; here it shows that the memory is the same.
    assert make().recv_checkpoint(0, donor.metadata(), 0, LONG).tolist() == [5, 5, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_an_accelerator_are_copied_by_send_and_arrive_on_the_cpu(make: Make) -> None:
    donor = make()
    weight = torch.zeros(3, device="cuda")
    donor.send_checkpoint([1], 0, weight, LONG)
    weight.fill_(5)
    got = make().recv_checkpoint(0, donor.metadata(), 0, LONG)
    assert got.device.type == "cpu"
    assert got.tolist() == [0, 0, 0]


def test_allow_checkpoint_relabels_what_is_offered(make: Make) -> None:
    donor = make()
    with pytest.raises(PhaseError, match="send_checkpoint"):
        donor.allow_checkpoint(4)
    donor.send_checkpoint([1], 3, {"x": 1}, LONG)
    donor.allow_checkpoint(3)
    assert make().recv_checkpoint(0, donor.metadata(), 3, LONG) == {"x": 1}


def test_a_state_that_cannot_travel_opens_no_window(make: Make) -> None:
    donor = make()
    with pytest.raises(TypeError, match=r"state_dict\['f'\]"):
        donor.send_checkpoint([1], 3, {"f": object()}, LONG)
    with pytest.raises(TimeoutError):
        make().recv_checkpoint(0, donor.metadata(), 3, SHORT)


def test_bytes_are_counted_alike_at_both_ends(make: Make) -> None:
    donor, healing = make(), make(num_chunks=3)
    donor.send_checkpoint([1], 3, some_state(), LONG)
    healing.recv_checkpoint(0, donor.metadata(), 3, LONG)
    donor.disallow_checkpoint()
    assert donor.bytes_sent == healing.bytes_received
    assert donor.bytes_sent > sum(i * 7 * 4 for i in range(20))


class SlowHealer:
    """Asks for a state over a small receive buffer and does not read it."""

    def __init__(self, donor: HTTPTransport[Any], step: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(30)
        self.socket.connect(("127.0.0.1", donor._server.port))
        self.socket.sendall(f"GET /checkpoint/{step}/0-of-1 HTTP/1.1\r\n\r\n".encode())
        assert self.socket.recv(8) == b"HTTP/1.1"

    def read_to_the_end(self) -> int:
        total = 0
        try:
            while got := len(self.socket.recv(1 << 20)):
                total += got
        except ConnectionResetError:
            pass
        return total

    def close(self) -> None:
        self.socket.close()


def test_a_slow_healer_never_makes_the_donors_commit_raise(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """An old failing that must not come back: the donor raised after its
    group had decided to commit, and fell behind its own ranks."""
    donor = make(timeout=SHORT)
    donor.send_checkpoint([1], 3, torch.zeros(64 << 20, dtype=torch.uint8), LONG)
    healer = SlowHealer(donor, 3)
    with caplog.at_level(logging.WARNING):
        donor.disallow_checkpoint()
    assert "will heal again" in caplog.text
    assert healer.read_to_the_end() < 64 << 20, "it was cut"
    healer.close()


def test_disallow_waits_for_a_download_that_is_under_way(make: Make) -> None:
    donor = make()
    size = 16 << 20
    donor.send_checkpoint([1], 3, torch.zeros(size, dtype=torch.uint8), LONG)
    healer = SlowHealer(donor, 3)
    read: list[int] = []
    reader = threading.Thread(target=lambda: read.append(healer.read_to_the_end()))
    reader.start()
    donor.disallow_checkpoint()
    reader.join(30)
    assert read[0] > size
    healer.close()


def test_shutdown_cuts_downloads_frees_the_port_and_can_be_repeated(make: Make) -> None:
    donor = make()
    donor.send_checkpoint([1], 3, torch.zeros(64 << 20, dtype=torch.uint8), LONG)
    healer = SlowHealer(donor, 3)
    donor.shutdown()
    donor.shutdown(wait=False)
    assert healer.read_to_the_end() < 64 << 20
    healer.close()
    with pytest.raises(HealError, match="probably died"):
        make().recv_checkpoint(0, donor.metadata(), 3, LONG)
    assert not [t for t in threading.enumerate() if t is donor._server._acceptor]


def test_a_donor_that_is_not_there_is_an_error_at_once(make: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(HealError, match=rf"refused.*rank 2 at http://127.0.0.1:{port}"):
        make().recv_checkpoint(2, f"http://127.0.0.1:{port}/checkpoint/", 3, LONG)


@pytest.mark.parametrize("metadata", ["<n/a>", "", "https://h:1/", "http://h/", "http://h:x/"])
def test_metadata_of_another_transport_is_named(make: Make, metadata: str) -> None:
    with pytest.raises(HealError, match="same checkpoint transport"):
        make().recv_checkpoint(0, metadata, 3, LONG)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_it_is_reached_over_ipv4_and_ipv6(make: Make, host: str) -> None:
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("this host has no IPv6")
    donor = make()
    donor.send_checkpoint([1], 3, {"x": 1}, LONG)
    metadata = f"http://{host}:{donor._server.port}/checkpoint/"
    assert make().recv_checkpoint(0, metadata, 3, LONG) == {"x": 1}


def test_without_ipv6_it_serves_ipv4(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    donor = make()
    donor.send_checkpoint([1], 3, {"x": 1}, LONG)
    metadata = f"http://127.0.0.1:{donor._server.port}/checkpoint/"
    assert make().recv_checkpoint(0, metadata, 3, LONG) == {"x": 1}


def test_a_host_name_that_does_not_resolve_is_replaced_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    with caplog.at_level(logging.WARNING):
        address = http_module._resolvable_hostname()
    assert socket.inet_aton(address)
    assert "'no-such-host.invalid' does not resolve" in caplog.text


def test_proxies_of_the_environment_are_not_used(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    donor = make()
    donor.send_checkpoint([1], 3, {"x": 1}, LONG)
    assert make().recv_checkpoint(0, donor.metadata(), 3, LONG) == {"x": 1}


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(
        SettingsError, match="num_chunks=-1: it must be an integer, at least 0 and at most 256"
    ):
        HTTPTransport(LONG, -1)
    with pytest.raises(SettingsError, match=r"timeout=.*above 0"):
        HTTPTransport(timedelta(0), 0)


def test_it_is_a_checkpoint_transport(make: Make) -> None:
    assert isinstance(make(), CheckpointTransport)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_keeps_no_socket_of_the_donor(make: Make) -> None:
    donor = make()
    donor.send_checkpoint([1], 3, torch.zeros(64 << 20, dtype=torch.uint8), LONG)
    healer = SlowHealer(donor, 3)
    child = os.fork()
    if child == 0:
        sockets = [donor._server._listener, *donor._server._connections]
        os._exit(len(sockets) * 10 + sum(s.fileno() != -1 for s in sockets))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 20
    healer.close()


def test_a_donor_without_a_state_says_why_at_once(make: Make) -> None:
    donor, healing = make(), make()
    donor.refuse_checkpoint([1], 3, "KeyError: 'ema'", LONG)
    with pytest.raises(HealError, match=r"^the donor refused \(500\): KeyError: 'ema', healing to"):
        healing.recv_checkpoint(0, donor.metadata(), 3, LONG)
    donor.disallow_checkpoint()
    donor.send_checkpoint([1], 4, {"w": 1}, LONG)
    assert healing.recv_checkpoint(0, donor.metadata(), 4, LONG) == {"w": 1}


def test_a_value_that_cannot_travel_is_named(make: Make) -> None:
    transport = make()
    transport.check_state({"w": torch.ones(2)})
    with pytest.raises(TypeError, match=r"state_dict\['lock'\]: a lock"):
        transport.check_state({"lock": threading.Lock()})
