"""Whether a lighthouse answers at an address, and in a version of the wire that we speak."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from torchft.cli.checks.check import Check
from torchft.errors import TorchftError

__all__ = ["Answer", "NoLighthouse", "ask", "lighthouse", "own_lighthouse", "parse_address"]

CLOCKS_APART_S = 5.0
"""More than this between two machines' clocks is remarked on."""

START = "start one: torchft_lighthouse --min_replicas 1"
FORM = "write it as http://HOST:PORT, such as http://localhost:29510"


class NoLighthouse(TorchftError):
    """What answers there, if anything, is no lighthouse."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a lighthouse says of itself."""

    wire: str | None
    """Version of our additions to the wire; None: an existing torchft, which has none."""
    status: dict[str, Any]
    """`/status.json`; empty where there is none."""
    clock_ahead_s: float
    """Its wall clock minus ours, to about a second."""


def parse_address(address: str) -> SplitResult:
    """The parts of an `http://host:port`. Raises NoLighthouse for any other form."""
    try:
        parts = urlsplit(address)
        good = parts.scheme == "http" and parts.hostname and parts.port
    except ValueError:
        good = False
    if not good:
        raise NoLighthouse(f"{address!r} is no address of a lighthouse: {FORM}")
    return parts


def ask(address: str, *, timeout_s: float) -> Answer:
    """Ask it for its health and status over HTTP/1.1.

    Raises:
        NoLighthouse: a wrong form of address, or something else answers there.
        OSError: nothing answers.
    """
    parts = parse_address(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    with contextlib.closing(connection):
        health, _ = _get(connection, "/healthz")
        now, date = time.time(), health.getheader("date")
        if health.status == 404:  # an existing torchft has no such route, but a page
            return Answer(wire=None, status={}, clock_ahead_s=0.0)
        if health.status != 200:
            raise NoLighthouse(f"{address} answers {health.status} {health.reason} to GET /healthz")
        _, text = _get(connection, "/status.json")
    try:
        status = json.loads(text)
    except ValueError:
        raise NoLighthouse(f"{address} is no lighthouse: its /status.json is no JSON") from None
    ahead = parsedate_to_datetime(date).timestamp() - now if date else 0.0
    return Answer(wire=health.getheader("torchft-wire"), status=status, clock_ahead_s=ahead)


def _get(connection: http.client.HTTPConnection, path: str) -> tuple[http.client.HTTPResponse, str]:
    try:
        connection.request("GET", path, headers={"Connection": "keep-alive"})
        response = connection.getresponse()
        return response, response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise NoLighthouse(f"what listens there does not speak HTTP: {error!r}") from error


def lighthouse(address: str | None, *, timeout_s: float = 5.0) -> Check:
    """The lighthouse that the groups will ask."""
    name = "lighthouse"
    if address is None:
        return Check.warn(
            name,
            "TORCHFT_LIGHTHOUSE is not set, so none was asked",
            "set it to http://HOST:PORT, or check one by --lighthouse URL",
        )
    try:
        answer = ask(address, timeout_s=timeout_s)
        with own_lighthouse() as own_address:
            ours = ask(own_address, timeout_s=timeout_s).wire
    except NoLighthouse as error:
        return Check.fail(name, str(error), f"check the address; {FORM}")
    except OSError as error:
        return Check.fail(name, f"{address} cannot be reached: {error}", START)
    return _judge(address, answer, ours)


def _judge(address: str, answer: Answer, ours: str | None) -> Check:
    name = "lighthouse"
    if answer.wire is None:
        return Check.warn(
            name,
            f"{address} is one of an existing torchft: it works, without what this one adds",
            "use this package's torchft_lighthouse",
        )
    if major(answer.wire) != major(ours):
        return Check.fail(
            name,
            f"{address} speaks wire version {answer.wire}, this installation {ours}",
            "install the same torchft on both machines",
        )
    if abs(answer.clock_ahead_s) > CLOCKS_APART_S:
        return Check.warn(
            name,
            f"{address} answers, and its clock is {answer.clock_ahead_s:+.0f} s off ours",
            "run an NTP client on both machines: logs will be hard to compare",
        )
    replicas = len(answer.status.get("replicas", ()))
    return Check.ok(name, f"{address} answers, wire version {answer.wire}, {replicas} replicas")


def major(wire: str | None) -> str:
    """The first number of a version: `1.2` → `1`."""
    return (wire or "").partition(".")[0]


@contextlib.contextmanager
def own_lighthouse() -> Iterator[str]:
    """One of this installation, on loopback and a free port. Raises ImportError without it."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1)
    try:
        yield f"http://127.0.0.1:{parse_address(server.address()).port}"
    finally:
        server.shutdown()
