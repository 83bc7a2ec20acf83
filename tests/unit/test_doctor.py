"""What the doctor finds, and what it then says."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata

import pytest

import torchft
from torchft.cli import doctor
from torchft.cli.checks import lighthouse, machine, network, versions
from torchft.cli.checks.check import Check, Status
from torchft.cli.main import main


def unresolvable(name: str) -> list[str]:
    raise OSError(-2, "Name or service not known")


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


# ---------------------------------------------------------------- versions


def test_an_old_python_fails() -> None:
    assert versions.python((3, 10)).status is Status.FAIL
    assert versions.python((3, 11)).status is Status.OK


@pytest.mark.parametrize(
    ("installed", "status"),
    [("2.6.1", Status.FAIL), ("2.7.0", Status.OK), ("2.15.0+cu132", Status.OK)],
)
def test_torch_is_good_from_2_7_on(installed: str, status: Status) -> None:
    assert versions.torch(installed).status is status


def test_without_torch_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions.metadata, "version", not_there)
    monkeypatch.delitem(sys.modules, "torchft.cli.checks.gloo_pair", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ImportError
    assert versions.torch() == Check.fail(
        "torch", "torch is not installed", "install torch 2.7 or later"
    )
    assert network.gloo().status is Status.FAIL


@pytest.mark.parametrize("other", ["torchft 0.2.0", "torchft-nightly 2026.10.26"])
def test_two_packages_of_one_import_name_are_named_with_the_way_out(other: str) -> None:
    check = versions.package([other, f"torchft {torchft.__version__}"])
    assert check.status is Status.FAIL
    assert other in check.found
    assert f"pip uninstall {other.split()[0]}" in (check.remedy or "")


def test_the_package_alone_says_whose_interface_it_has() -> None:
    alone = versions.package([f"torchft {torchft.__version__}"])
    assert alone.status is Status.OK
    assert alone.found == f"{torchft.__version__}, the interface of torchft {torchft.UPSTREAM_API}"


def test_the_extension_serves_here() -> None:
    check = versions.extension()
    assert check == Check.ok("extension", "serves here and speaks wire version 1")


# ---------------------------------------------------------------- machine


@pytest.mark.parametrize(
    ("omp", "status", "found"),
    [
        ("2", Status.OK, "OMP_NUM_THREADS=2, 4 cores"),
        ("8", Status.WARN, "OMP_NUM_THREADS=8 on 4 cores"),
        ("many", Status.FAIL, "'many' is no number"),
        (None, Status.WARN, "is not set"),
    ],
)
def test_threads_fit_the_cores(omp: str | None, status: Status, found: str) -> None:
    check = machine.threads(omp, cores=4)
    assert check.status is status
    assert found in check.found


def test_few_open_files_are_remarked_on() -> None:
    assert machine.open_files(256).status is Status.WARN
    assert machine.open_files(4096).status is Status.OK


def test_a_clock_that_was_never_set_fails() -> None:
    check = machine.clock(now=0.0, synchronised=True)
    assert check.status is Status.FAIL
    assert "1970-01-01" in check.found


def test_a_clock_that_nobody_keeps_right_is_remarked_on() -> None:
    assert machine.clock(now=2e9, synchronised=False).status is Status.WARN
    assert machine.clock(now=2e9, synchronised=True).status is Status.OK


def test_the_kernel_can_be_asked_about_its_clock() -> None:
    assert machine.kept_right() in (True, False, None)


# ---------------------------------------------------------------- network


def test_a_name_that_does_not_resolve_fails_and_says_where_to_add_it() -> None:
    check = network.host_name("nowhere", resolve=unresolvable)
    assert check.status is Status.FAIL
    assert "nowhere does not resolve" in check.found
    assert "/etc/hosts" in check.remedy


def test_a_name_of_another_machine_fails() -> None:
    check = network.host_name("here", resolve=lambda _: ["192.0.2.1"])
    assert check.status is Status.FAIL
    assert "192.0.2.1 is no address of this machine" in check.found


def test_a_name_for_loopback_serves_one_machine_only() -> None:
    check = network.host_name("here", resolve=lambda _: ["127.0.0.1"])
    assert check.status is Status.WARN
    assert "others do not find it" in check.found


def test_a_name_server_that_answers_no_is_quick_enough() -> None:
    def nobody() -> None:
        raise OSError("no such name")

    assert network.look_ups(nobody).status is Status.OK


def test_a_silent_name_server_is_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100, 5))
    monkeypatch.setattr(network.time, "monotonic", lambda: float(next(clock)))
    check = network.look_ups(lambda: None)
    assert check.status is Status.WARN
    assert "5.0 s" in check.found
    assert "RES_OPTIONS" in check.remedy


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


@pytest.mark.parametrize(
    ("chosen", "status"),
    [(None, Status.OK), ("eth0", Status.OK), ("lo", Status.WARN), ("eth7", Status.FAIL)],
)
def test_gloo_needs_an_interface_that_is_there(chosen: str | None, status: Status) -> None:
    assert network.gloo_interface(chosen, names=["lo", "eth0"]).status is status


def test_two_gloo_ranks_average_here() -> None:
    assert network.gloo().status is Status.OK


# ---------------------------------------------------------------- lighthouse


@pytest.mark.parametrize(
    "address", ["localhost:29510", "http://localhost", "grpc://a:1", "http://a:x"]
)
def test_a_wrong_form_of_address_is_shown_a_right_one(address: str) -> None:
    check = lighthouse.lighthouse(address)
    assert check.status is Status.FAIL
    assert "http://HOST:PORT" in check.remedy


def test_no_address_is_only_remarked_on() -> None:
    assert lighthouse.lighthouse(None).status is Status.WARN


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


# ---------------------------------------------------------------- the command


def test_the_exit_code_tells_failures_not_warnings() -> None:
    ok, warn = Check.ok("a", "fine"), Check.warn("b", "odd", "look")
    assert doctor.exit_code([ok, warn]) == 0
    assert doctor.exit_code([ok, Check.fail("c", "broken", "mend it")]) == 1


def test_a_line_says_how_it_is_and_the_next_what_to_do() -> None:
    assert doctor.text_of(Check.ok("python", "3.11")) == "ok   python          3.11"
    first, second = doctor.text_of(Check.fail("torch", "2.1", "install 2.7")).splitlines()
    assert first.startswith("fail torch")
    assert second.strip() == "→ install 2.7"


def test_json_is_for_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "all_checks", lambda _: [Check.warn("b", "odd", "look")])
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "b", "status": "warn", "found": "odd", "remedy": "look"}
    ]


def test_every_check_that_is_not_ok_has_a_remedy() -> None:
    for check in doctor.all_checks("http://127.0.0.1:1"):
        assert check.found
        assert (check.status is Status.OK) == (check.remedy == ""), check
