"""What the doctor finds, and what it then says."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import pytest

import torchft
from torchft.cli import doctor
from torchft.cli.checks import lighthouse, machine, network, versions
from torchft.cli.checks.check import Check, Status
from torchft.cli.main import main


def unresolvable(name: str) -> list[str]:
    raise OSError(-2, "Name or service not known")


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


@pytest.mark.parametrize(
    ("chosen", "status"),
    [(None, Status.OK), ("eth0", Status.OK), ("lo", Status.WARN), ("eth7", Status.FAIL)],
)
def test_gloo_needs_an_interface_that_is_there(chosen: str | None, status: Status) -> None:
    assert network.gloo_interface(chosen, names=["lo", "eth0"]).status is status


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
