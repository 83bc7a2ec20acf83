"""TLS from end to end, with a certificate that the test makes."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.ps import Fleet, options
from integration.test_ps_faults import TOKENS

from torchft.cli.diloco import main
from torchft.errors import SettingsError, UnreachableError
from torchft.parameter_server.auth import Scope
from torchft.parameter_server.server.server import Address, DiLoCoServer
from torchft.parameter_server.worker.client import DiLoCoClient

pytestmark = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl makes the certificate, and is not here"
)
WORKER = TOKENS.by_scope[Scope.WORKER]


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Self-signed, for 127.0.0.1: certificate and key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, Path]:
    return certificate(tmp_path, "ours")


@pytest.fixture
def server(tmp_path: Path, ours: tuple[Path, Path]) -> Iterator[DiLoCoServer]:
    cert, key = ours
    address = Address(port=0, tokens=TOKENS, tls_cert=cert, tls_key=key)
    with DiLoCoServer(options(tmp_path / "out", workers=2), address) as one:
        yield one


def test_two_workers_train_over_tls(server: DiLoCoServer, ours: tuple[Path, Path]) -> None:
    fleet = Fleet(f"https://{server.address}", auth_token=WORKER, tls_ca=ours[0], codec="int8")
    fleet.run("a", 10, seed=1)
    fleet.run("b", 10, seed=2)
    fleet.join()
    assert torch.equal(fleet.weights("a"), fleet.weights("b"))
    assert fleet.workers["a"].sync_count == 2


def test_status_over_tls(
    server: DiLoCoServer,
    ours: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = ["status", "--server", f"https://{server.address}", "--auth-token", WORKER]
    assert main(typed) == 1
    assert "CERTIFICATE_VERIFY_FAILED" in capsys.readouterr().err
    monkeypatch.setenv("DILOCO_TLS_CA", str(ours[0]))
    assert main(typed) == 0
    assert "synchronous: 0 rounds" in capsys.readouterr().out


def test_a_server_with_another_certificate_gets_no_token(
    server: DiLoCoServer, tmp_path: Path
) -> None:
    other, _ = certificate(tmp_path, "other")
    for trusted in (other, None):
        client = DiLoCoClient(f"https://{server.address}", token=WORKER, tls_ca=trusted)
        with pytest.raises(UnreachableError, match=r"CERTIFICATE_VERIFY_FAILED.*DILOCO_TLS_CA"):
            client.get("/v1/status")


def test_a_worker_that_speaks_plainly_is_told_nothing(server: DiLoCoServer) -> None:
    with pytest.raises(UnreachableError, match="no answer from the parameter server"):
        DiLoCoClient(server.address, token=WORKER, timeout_s=10.0).get("/v1/status")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
        plain.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP/1.1 200" not in plain.recv(4096)


# An error of ours that must not come back: a worker tried again for ten minutes.
def test_what_is_no_certificate_to_trust_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("nothing")
    for file in ("no.pem", "absent.pem"):
        with pytest.raises(SettingsError, match=f"{file} .*check DILOCO_TLS_CA"):
            DiLoCoClient("https://127.0.0.1:1", tls_ca=tmp_path / file)


def test_files_that_are_no_certificate_are_refused(
    tmp_path: Path, ours: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.pem").write_text("nothing")
    for cert, key in ((tmp_path / "no.pem", ours[1]), (ours[0], tmp_path / "absent.key")):
        with pytest.raises(SettingsError, match=r"cannot use .* for TLS"):
            Address(port=0, tls_cert=cert, tls_key=key).ssl_context()
    flags = ["--no-auth", "--port", "0", "--tls-cert", str(tmp_path / "no.pem")]
    flags += ["--tls-key", str(ours[1])]
    assert main(["server", "-o", str(tmp_path / "out"), "-n", "1", *flags]) == 2
    assert "for TLS" in capsys.readouterr().err
