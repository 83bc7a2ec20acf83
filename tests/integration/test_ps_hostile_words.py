"""What strangers send ends as one line of the log, without a traceback, and nobody's files grow."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.ps import options
from helpers.voices import Voice, raw
from helpers.waiting import until

from torchft.parameter_server.core.refused import printable
from torchft.parameter_server.server.server import Address, DiLoCoServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DiLoCoServer]:
    made = options(tmp_path, 1, heartbeat_timeout_s=0.6, grace_s=0.2)
    with DiLoCoServer(made, Address(port=0)) as found:
        yield found


def register(body: bytes, path: bytes = b"/v1/register") -> bytes:
    length = str(len(body)).encode()
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: " + length + b"\r\nConnection: close\r\n\r\n" + body


def model(name: str = "w", fragments: str = "[[0]]") -> bytes:
    described = (
        f'{{"parameters": [[{json.dumps(name)}, [1], "float32"]], "fragments": {fragments}}}'
    )
    return f'{{"worker": "a", "session": "b", "model": {described}}}'.encode()


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(b"GET /%0aforged%20line%1b[2J HTTP/1.1\r\nHost: x\r\n\r\n", id="path"),
        pytest.param(register(b"{}", b"/v1/control/%0d%0aforged"), id="order"),
        pytest.param(register(b'{"worker": "x\\nforged", "session": "b"}'), id="worker"),
        pytest.param(register(b'{"worker": "\\ud800", "session": "b"}'), id="surrogate"),
        pytest.param(register(model("x\nforged \x1b[2J")), id="parameter"),
        pytest.param(register(model("\ud800")), id="parameter with a surrogate"),
        pytest.param(register(model(fragments="[[1e999]]")), id="infinite position"),
        pytest.param(register(model(fragments="[[0.7]]")), id="half a position"),
        pytest.param(b"GET //[ HTTP/1.1\r\nHost: x\r\n\r\n", id="no address"),
        pytest.param(b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n", id="half an address"),
        pytest.param(b"\x00\x01\r\n\r\n", id="no HTTP"),
        pytest.param(
            b"POST /v1/register HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            id="no chunks",
        ),
    ],
)
def test_garbage_is_one_printable_line_of_the_log(
    server: DiLoCoServer, request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert b" 4" in raw(server, request_).split(b"\r\n")[0]
    for record in caplog.records:
        said = logging.Formatter().format(record)
        assert said.isprintable() or record.name == "asyncio", said
        assert "Traceback" not in said


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_a_worker_is_not_called_like_a_folder(server: DiLoCoServer, name: str) -> None:
    body = model().replace(b'"worker": "a"', b'"worker": "' + name.encode() + b'"')
    assert b"not dots alone" in raw(server, register(body))


def test_what_is_said_stays_one_line_and_ends() -> None:
    assert printable("a\nb\x1b[2J\ud800é") == "a\\nb\\x1b[2J\\ud800é"
    assert printable("x" * 500) == "x" * 300 + "…"


def test_workers_that_die_in_the_middle_of_an_upload_leave_no_files(
    server: DiLoCoServer, tmp_path: Path
) -> None:
    for number in range(5):
        voice = Voice(server.address, f"dies{number}", scope=None)
        voice.begin()
        voice.register(beat_s=0.05)  # it promises to be heard, and is not
        assert voice.ticket()["have"] == 0  # its file is there; the numbers never come
    uploads = tmp_path / "spool" / "uploads"
    assert len(list(uploads.glob("*.row"))) >= 5
    until(lambda: not list(uploads.glob("*.row")), "the dead are workers no more")


def test_status_is_printed_in_a_plain_ascii_locale(server: DiLoCoServer) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "torchft.cli.diloco", "status", "--server", server.address],
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
