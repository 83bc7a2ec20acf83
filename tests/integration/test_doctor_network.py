"""What the doctor finds when it connects: ports, gloo, and whoever answers as a lighthouse."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from torchft.cli import doctor
from torchft.cli.checks import lighthouse, network, versions
from torchft.cli.checks.check import Check, Status


class FakeLighthouse(HTTPServer):
    """Answers as told: status of /healthz, wire version, and the text of /status.json."""

    health = 200
    wire: str | None = "1"
    status = '{"replicas": []}'

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeLighthouse

    def do_GET(self) -> None:
        text = self.server.status if self.path == "/status.json" else "ok\n"
        self.send_response_only(self.server.health)
        if self.server.wire is not None:
            self.send_header("torchft-wire", self.server.wire)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def fake() -> Iterator[FakeLighthouse]:
    server = FakeLighthouse(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        yield listener.getsockname()[1]


def test_the_extension_serves_here() -> None:
    check = versions.extension()
    assert check == Check.ok("extension", "serves here and speaks wire version 1")


def test_a_name_of_another_machine_fails() -> None:
    check = network.host_name("here", resolve=lambda _: ["192.0.2.1"])
    assert check.status is Status.FAIL
    assert "192.0.2.1 is no address of this machine" in check.found


def test_a_name_for_loopback_serves_one_machine_only() -> None:
    check = network.host_name("here", resolve=lambda _: ["127.0.0.1"])
    assert check.status is Status.WARN
    assert "others do not find it" in check.found


def test_a_taken_port_is_named(taken: int) -> None:
    check = network.ports([taken], is_lighthouse=lambda _: False)
    assert check.status is Status.WARN
    assert str(taken) in check.found


def test_a_lighthouse_on_its_own_port_is_no_trouble(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "LIGHTHOUSE_PORT", taken)
    check = network.ports([taken], is_lighthouse=lambda port: port == taken)
    assert check.status is Status.OK
    assert "a lighthouse listens on it" in check.found


def test_two_gloo_ranks_average_here() -> None:
    assert network.gloo().status is Status.OK


def test_a_lighthouse_that_is_not_there_fails_and_is_told_how_to_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    check = lighthouse.lighthouse(f"http://127.0.0.1:{port}")
    assert check.status is Status.FAIL
    assert "torchft_lighthouse --min_replicas" in check.remedy


def test_our_own_lighthouse_is_fine() -> None:
    with lighthouse.own_lighthouse() as address:
        check = lighthouse.lighthouse(address)
    assert check.status is Status.OK
    assert "wire version 1, 0 replicas" in check.found


def test_a_later_wire_is_incompatible(fake: FakeLighthouse) -> None:
    fake.wire = "2.0"
    check = lighthouse.lighthouse(fake.address)
    assert check.status is Status.FAIL
    assert "speaks wire version 2.0, this installation 1" in check.found


def test_an_existing_torchft_has_no_health_route_and_works(fake: FakeLighthouse) -> None:
    fake.health, fake.wire = 404, None
    check = lighthouse.lighthouse(fake.address)
    assert check.status is Status.WARN
    assert "existing torchft" in check.found


@pytest.mark.parametrize(("health", "status"), [(500, "{}"), (200, "<html>")])
def test_another_program_is_no_lighthouse(fake: FakeLighthouse, health: int, status: str) -> None:
    fake.health, fake.status = health, status
    assert lighthouse.lighthouse(fake.address).status is Status.FAIL


def test_every_check_that_is_not_ok_has_a_remedy() -> None:
    for check in doctor.all_checks("http://127.0.0.1:1"):
        assert check.found
        assert (check.status is Status.OK) == (check.remedy == ""), check
