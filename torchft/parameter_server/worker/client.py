"""The worker's HTTP: every call ends, by an answer, a refusal or `UnreachableError`.

It needs the standard library alone. A connection is kept between calls and given up at the first
trouble; all calls are harmless to repeat.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from torchft.errors import SettingsError, UnreachableError
from torchft.parameter_server.core.refused import NotReady, refusal_of

__all__ = ["DiLoCoClient"]

_PIECE_BYTES = 1 << 20
_MAX_REPLY_BYTES = 64 << 20


class DiLoCoClient:
    """Talks to one server; for one thread at a time.

    `server` is `host:port`, or `https://host:port` for TLS; `timeout_s` bounds every wait for the
    network, not the whole of a transfer that moves.

    Raises:
        SettingsError: if `server` is not an address, or `tls_ca` not a certificate.
    """

    def __init__(
        self,
        server: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        tls_ca: Path | None = None,
    ) -> None:
        url = urlsplit(server if "://" in server else f"http://{server}")
        try:
            host, port = url.hostname, url.port
        except ValueError:
            host, port = None, None
        if url.scheme not in ("http", "https") or not host or not port:
            raise SettingsError(f"{server!r} is no address: give host:port, such as gpu-1:8512")
        self.host, self.port = host, port
        self._context = _tls(tls_ca) if url.scheme == "https" else None
        self._token, self._timeout_s = token, timeout_s
        self._connection: http.client.HTTPConnection | None = None

    def post(self, path: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Send JSON and return the JSON of the answer.

        Raises:
            Refused: if the server refuses the request; its message says why.
            UnreachableError: if there was no complete answer.
        """
        body = json.dumps(data).encode()
        return self._again("POST", path, body, {"Content-Type": "application/json"})

    def get(self, path: str) -> dict[str, Any]:
        """Get an answer in JSON; raises the same errors as `post`."""
        return self._again("GET", path, None, {})

    def put(
        self, path: str, pieces: Iterable[memoryview], nbytes: int, **query: object
    ) -> dict[str, Any]:
        """Send `nbytes` in pieces and return the JSON of the answer. Raises as `post`."""
        where = f"{path}?{urlencode(query)}"
        headers = {"Content-Length": str(nbytes), "Content-Type": "application/octet-stream"}
        with self._named():
            try:
                self._send("PUT", where, pieces, headers)
            except (BrokenPipeError, ConnectionResetError):
                # The server has refused before it had read all: its reason may still be here.
                if self._connection is None or self._connection.sock is None:
                    raise
            return self._answer()

    @contextlib.contextmanager
    def reading(self, name: str, nbytes: int) -> Iterator[Callable[[memoryview], None]]:
        """Open the last `nbytes` of a file of an update; the context is a function that fills the
        memory that it is given with the next bytes. Raises as `post`."""
        with self._named():
            self._send("GET", f"/v1/files/{quote(name)}", None, {"Range": f"bytes=-{nbytes}"})
            assert self._connection is not None
            reply = self._connection.getresponse()
            if reply.status not in (200, 206):
                _check(reply.status, reply.read(_PIECE_BYTES))
                raise http.client.HTTPException(f"{reply.status} for a file")

            def fill(memory: memoryview) -> None:
                at = 0
                while at < len(memory):
                    count = reply.readinto(memory[at:])
                    if not count:
                        raise ConnectionError(f"{name} ends {len(memory) - at} bytes too early")
                    at += count

            yield fill
            reply.read()

    def close(self) -> None:
        """Close the connection; the next call makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # ------------------------------------------------------------------ how

    def _again(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> dict[str, Any]:
        """A kept connection may have been closed meanwhile: then once more, over a new one."""
        kept = self._connection is not None
        try:
            return self._once(method, path, body, headers)
        except UnreachableError:
            if not kept:
                raise
            return self._once(method, path, body, headers)

    def _once(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> dict[str, Any]:
        with self._named():
            self._send(method, path, body, headers)
            return self._answer()

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[memoryview] | None,
        headers: dict[str, str],
    ) -> None:
        if self._connection is None:
            self._connection = self._made()
        if self._token is not None:
            headers = {**headers, "Authorization": f"Bearer {self._token}"}
        self._connection.request(method, path, body, headers)

    def _answer(self) -> dict[str, Any]:
        assert self._connection is not None
        reply = self._connection.getresponse()
        if (reply.length or 0) > _MAX_REPLY_BYTES:
            raise http.client.HTTPException(f"an answer of {reply.length} bytes")
        body = reply.read()
        if reply.will_close:
            self.close()
        _check(reply.status, body)
        data = json.loads(body)
        if not isinstance(data, dict):
            raise http.client.HTTPException("the answer is no JSON object")
        return data

    def _made(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self.host, self.port, timeout=self._timeout_s)
        return http.client.HTTPSConnection(
            self.host, self.port, timeout=self._timeout_s, context=self._context
        )

    @contextlib.contextmanager
    def _named(self) -> Any:
        """Trouble of any kind ends the connection and has one name."""
        try:
            yield
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            self.close()
            untrusted = isinstance(error, ssl.SSLCertVerificationError)
            hint = "; DILOCO_TLS_CA names the certificate to trust" if untrusted else ""
            raise UnreachableError(
                f"no answer from the parameter server at {self.host}:{self.port}: "
                f"{type(error).__name__}: {error}{hint}"
            ) from error
        except BaseException:
            self.close()
            raise


def _tls(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca is None else str(ca))
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or error
        raise SettingsError(
            f"cannot use {ca} as a certificate: {reason}; check DILOCO_TLS_CA"
        ) from None


def _check(status: int, body: bytes) -> None:
    # Whoever says 5xx, the server or a proxy before it, may be well again soon.
    if status >= 500 and status != NotReady.status:
        raise http.client.HTTPException(f"{status}, {_reason(body)}")
    if status >= 400:
        raise refusal_of(status, _reason(body))


def _reason(body: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["error"])
    return body[:200].decode(errors="replace")
