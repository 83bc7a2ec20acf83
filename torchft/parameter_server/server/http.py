"""The server's HTTP face: convert, ask the state, answer.

    POST /v1/register /v1/heartbeat /v1/deregister /v1/tickets                 worker   JSON
    PUT  /v1/uploads/{upload}?from=k    PUT /v1/weights/{fragment}?from=k      worker   chunks
    POST /v1/news                    the update since a base, or waits         worker   JSON
    GET  /v1/files/{name}            files of updates, with ranges             worker   chunks
    GET  /v1/status  /metrics                                                  read
    POST /v1/control/{order}                                                   admin    JSON
    GET  /healthz  /  /dashboard               the page has no numbers itself  anybody

Nothing is held open for longer than a few seconds but a transfer that moves. Whoever sends garbage
gets a 4xx with the reason, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import StreamReader, web

from torchft.arguments import integer_from
from torchft.errors import MismatchError, SettingsError
from torchft.parameter_server.auth import Scope, Tokens
from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.refused import (
    Forbidden,
    Interrupted,
    NotFound,
    Refused,
    TooLarge,
    Unauthorized,
    Unfit,
    printable,
)
from torchft.parameter_server.core.requests import (
    Registration,
    SubmissionOffer,
    WorkerSession,
    integer,
    real,
    text,
)
from torchft.parameter_server.server.page import headers, page
from torchft.parameter_server.server.state import ServerState
from torchft.parameter_server.server.status import metrics_of, status_of
from torchft.parameter_server.server.upload import Upload

__all__ = ["LONGEST_WAIT_S", "HttpService"]

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]] | dict[str, Any]]

LONGEST_WAIT_S = 5.0
"""A request for an update is answered after this time at the latest."""
MAX_JSON_BYTES = 8 << 20
"""About a hundred thousand parameters."""
_NO_ROOM = 507
_FILE = re.compile(r"f\d+-v\d+(?:-[0-9a-f]{16})?\.(?:delta|whole)")


class HttpService:
    """Handlers over one `ServerState`. `tokens` None: everybody may do everything."""

    def __init__(
        self,
        state: ServerState,
        tokens: Tokens | None,
        *,
        read_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.state, self.tokens, self._clock, self._stop = state, tokens, clock, stop
        self._read_timeout_s = read_timeout_s
        self._began, self._page = clock(), page()

    def app(self) -> web.Application:
        """The routes, each behind a check of its token and a layer for errors."""
        app, state = web.Application(client_max_size=MAX_JSON_BYTES), self.state
        routes: list[tuple[str, str, Scope | None, Handler]] = [
            ("GET", "/healthz", None, self._health),
            ("GET", "/", None, self._dashboard),
            ("GET", "/dashboard", None, self._dashboard),
            ("GET", "/v1/status", Scope.READ, self._status),
            ("GET", "/metrics", Scope.READ, self._metrics),
            ("PUT", "/v1/uploads/{upload}", Scope.WORKER, self._upload),
            ("PUT", "/v1/weights/{fragment}", Scope.WORKER, self._weights),
            ("GET", "/v1/files/{name}", Scope.WORKER, self._file),
            ("POST", "/v1/control/{order}", Scope.ADMIN, self._control),
        ]
        answers: dict[str, Answer] = {
            "/v1/register": lambda data: state.register(Registration.of(data)),
            "/v1/heartbeat": lambda data: state.beat(
                WorkerSession.of(data), real(data, "steps_per_second")
            ),
            "/v1/deregister": lambda data: state.leave(WorkerSession.of(data)),
            "/v1/tickets": lambda data: state.offer(SubmissionOffer.of(data)),
            "/v1/news": self._update,
        }
        routes += [("POST", p, Scope.WORKER, self._json_of(a)) for p, a in answers.items()]
        for method, path, scope, handler in routes:
            app.router.add_route(method, path, self._guarded(scope, handler))
        return app

    # ------------------------------------------------------------------ who, and what went wrong

    def _guarded(self, scope: Scope | None, handler: Handler) -> Handler:
        """The handler for whoever is allowed `scope`; an error becomes an answer that says why."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            try:
                self._admit(request, scope)
                return await handler(request)
            except Refused as error:
                status, reason = error.status, str(error)
            except MismatchError as error:
                status, reason = Unfit.status, str(error)
            except SettingsError as error:
                status, reason = Refused.status, str(error)
            except web.HTTPRequestEntityTooLarge:
                status, reason = TooLarge.status, f"more than {MAX_JSON_BYTES} bytes of JSON"
            except TimeoutError:
                reason = f"nothing came for {self._read_timeout_s:g} s: go on from there"
                status = Interrupted.status
            except (ConnectionError, asyncio.IncompleteReadError, web.RequestPayloadError):
                status, reason = Interrupted.status, "the body ended early: go on from there"
            except OSError as error:
                # Workers train on and ask again: there may be room by then.
                status, reason = _NO_ROOM, f"the server cannot write: {error.strerror}"
            return _refusal(request, status, reason)

        return guarded

    def _admit(self, request: web.Request, scope: Scope | None) -> None:
        if scope is None or self.tokens is None:
            return
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        found = self.tokens.scope_of(token.strip()) if kind.lower() == "bearer" else None
        if found is None:
            raise Unauthorized(
                "no valid token: give the one that the server printed when it was first started, "
                "with --auth-token-file or DILOCO_AUTH_TOKEN"
            )
        if found < scope:
            raise Forbidden(
                f"this needs a token for {scope.name.lower()}, not {found.name.lower()}"
            )

    def _json_of(self, answer: Answer) -> Handler:
        """A handler that answers a JSON object with another one."""

        async def handler(request: web.Request) -> web.StreamResponse:
            found = answer(await self._json(request))
            return web.json_response(await found if isinstance(found, Awaitable) else found)

        return handler

    async def _json(self, request: web.Request) -> dict[str, Any]:
        # A form of another site cannot send this type without the browser asking first.
        if request.content_type != "application/json":
            raise Refused("send JSON, as application/json")
        async with asyncio.timeout(self._read_timeout_s):
            body = await request.read()
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused("the body is no JSON") from None
        if not isinstance(data, dict):
            raise Refused("the body is no JSON object")
        return data

    # ------------------------------------------------------------------ short requests

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _dashboard(self, request: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html", headers=headers(self._page))

    def _report(self) -> dict[str, Any]:
        now = self._clock()
        return status_of(self.state, now, now - self._began)

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response(self._report())

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=metrics_of(self._report()))

    async def _update(self, data: dict[str, Any]) -> dict[str, Any]:
        fragment, base = integer(data, "fragment"), integer(data, "base")
        wait_s = min(real(data, "wait_s"), LONGEST_WAIT_S)
        update = await self.state.update(fragment, base, text(data, "identity"), wait_s)
        return asdict(update) if update else {"waiting": self.state.why_open(fragment)}

    # ------------------------------------------------------------------ bytes

    async def _upload(self, request: web.Request) -> web.Response:
        name = request.match_info["upload"]
        await self._receive(request, self.state.upload(name))
        return web.json_response(self.state.finish(name))

    async def _weights(self, request: web.Request) -> web.Response:
        who = WorkerSession.of(request.query)
        upload = self.state.initial(who, _number(request.match_info, "fragment"))
        await self._receive(request, upload)
        return web.json_response({"have": upload.have, **await self.state.finish_initial()})

    async def _receive(self, request: web.Request, upload: Upload) -> None:
        """Chunks from `from` on; while one is checked the next one is read."""
        index, chunks = _number({"from": "0", **request.query}, "from"), upload.chunks
        if index > upload.have:
            raise Refused(f"go on from chunk {upload.have}")
        self._check_length(request, chunks, index)
        checking: asyncio.Future[None] | None = None
        memories = chunks.memory(), chunks.memory()
        body = _Body(request.content)
        try:
            for at in range(index, chunks.count):
                data = memories[at % 2][: chunks.nbytes_of(at)]
                async with asyncio.timeout(self._read_timeout_s):
                    await body.fill(data)
                if checking is not None:
                    await checking
                checking = asyncio.ensure_future(self.state.take_chunk(upload, at, data))
        finally:
            if checking is not None:
                await checking

    def _check_length(self, request: web.Request, chunks: Chunks, index: int) -> None:
        right = chunks.nbytes - chunks.offset(min(index, chunks.count))
        length = request.content_length
        if length is None:
            raise Refused("an upload says how long it is")
        if length > right:
            raise TooLarge(f"{length} bytes are more than the {right} that this upload has left")

    async def _file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        path = self.state.update_file(name) if _FILE.fullmatch(name) else None
        if path is None:
            raise NotFound("this update is old: ask for a newer one")
        self.state.counts.bytes_out += path.stat().st_size
        return _UpdateFile(self.state, path)

    # ------------------------------------------------------------------ orders

    async def _control(self, request: web.Request) -> web.Response:
        data = await self._json(request)
        match request.match_info["order"]:
            case "save_state":
                path = await self.state.save()
                return web.json_response({"status": "ok", "checkpoint": path.name})
            case "kick_worker":
                if not self.state.kick(text(data, "worker")):
                    raise NotFound("there is no such worker")
            case "update_num_workers":
                workers = integer(data, "num_workers", 1)
                given = "min_workers" in data
                self.state.expect(workers, integer(data, "min_workers", 1) if given else None)
            case "update_optimizer":
                return web.json_response(self._update_optimizer(data))
            case "shutdown":
                self._stop()
            case order:
                raise NotFound(f"there is no order {order[:40]!r}")
        return web.json_response({"status": "ok"})

    def _update_optimizer(self, data: dict[str, Any]) -> dict[str, Any]:
        if not data.keys() or data.keys() - {"lr", "momentum"}:
            raise Refused("update_optimizer: give lr, momentum, or both")
        given = {name: real(data, name) if name in data else None for name in ("lr", "momentum")}
        outer = self.state.update_optimizer(**given)
        return {"status": "ok", "outer_lr": outer.lr, "outer_momentum": outer.momentum}


class _Body:
    """A request's body, read into memory that is there."""

    def __init__(self, stream: StreamReader) -> None:
        self._stream, self._left = stream, memoryview(b"")

    async def fill(self, memory: memoryview) -> None:
        """All of `memory`. Raises IncompleteReadError: the body ends before."""
        at = 0
        while at < len(memory):
            piece = self._left or memoryview(await self._stream.readany())
            if not piece:
                raise asyncio.IncompleteReadError(b"", len(memory) - at)
            count = min(len(piece), len(memory) - at)
            memory[at : at + count] = piece[:count]
            self._left = piece[count:]
            at += count


class _UpdateFile(web.FileResponse):
    """A file of an update, which stays as it is until all of it is sent."""

    def __init__(self, state: ServerState, path: Path) -> None:
        super().__init__(path, chunk_size=1 << 20)
        self._server_state, self._name = state, path.name

    async def prepare(self, request: web.BaseRequest) -> Any:
        with self._server_state.reading(self._name):
            return await super().prepare(request)


def _number(texts: Mapping[str, str], name: str) -> int:
    return integer({name: integer_from(texts[name])}, name)


def _refusal(request: web.Request, status: int, reason: str) -> web.Response:
    # Anybody may send a path or a value: none of them may forge a line or move a cursor.
    said = printable(f"{request.method} {request.raw_path}"), printable(reason)
    logger.info("%s from %s: %d, %s", said[0], request.remote, status, said[1])
    response = web.json_response({"error": said[1]}, status=status)
    if status not in (401, 403, 404, 409, 410, 503):
        response.force_close()  # what is left of its body is not worth reading
    return response
