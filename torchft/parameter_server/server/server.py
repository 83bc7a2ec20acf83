"""The whole server: its state behind a port, ended by a signal or an order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from torchft.errors import SettingsError
from torchft.parameter_server.auth import Tokens
from torchft.parameter_server.core.options import ServerOptions
from torchft.parameter_server.core.refused import printable
from torchft.parameter_server.server.http import HttpService
from torchft.parameter_server.server.state import ServerState

__all__ = ["Address", "DiLoCoServer", "run_until_signal", "serve"]

logger = logging.getLogger(__name__)

_TICK_S = 0.2
_IDLE_S = 30.0
"""A connection without a request is closed after this time, a slow head included."""
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Address:
    """Where to listen, and how it is protected."""

    host: str = "127.0.0.1"
    port: int = 8512
    tokens: Tokens | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    read_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("TLS needs both --tls-cert and --tls-key")

    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS context of the certificate and its key; None for plain HTTP.

        Raises:
            SettingsError: the files cannot be used.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(f"cannot use {self.tls_cert} for TLS: {error}") from None
        return context


async def serve(
    options: ServerOptions,
    address: Address,
    ready: Callable[[int], None],
    stop: asyncio.Event,
    save_at_end: Callable[[], bool] = lambda: True,
) -> None:
    """Serve until `stop`; `ready` gets the port.

    Raises:
        SettingsError: the port is taken, or what is in the output folder cannot be gone on from.
        StorageError: the disk is full or broken; the journal has what is needed to go on.
        Exception: an outer step failed; the journal has what is needed to do it again.
    """
    state = ServerState(options)
    try:
        await state.open()
    except BaseException:
        await state.close(save=False)
        raise
    service = HttpService(
        state, address.tokens, read_timeout_s=address.read_timeout_s, stop=stop.set
    )
    runner = web.AppRunner(
        service.app(),
        access_log=None,
        logger=_http_logger,
        keepalive_timeout=_IDLE_S,
        read_bufsize=_READ_BYTES,
        shutdown_timeout=2.0,
        auto_decompress=False,
    )
    await runner.setup()
    try:
        ready(await _listen(runner, address))
        await _until(stop, state)
    finally:
        await runner.cleanup()
        await state.close(save=save_at_end())


def _without_traceback_of_garbage(record: logging.LogRecord) -> bool:
    """In aiohttp's log of what went wrong, what no HTTP client would send is one line."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        said = printable(f"{record.getMessage()}: {type(error).__name__} {error.message}")
        record.msg, record.args, record.exc_info = said, (), None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


_http_logger = logging.getLogger(f"{__name__}.http")
_http_logger.addFilter(_without_traceback_of_garbage)


async def _listen(runner: web.AppRunner, address: Address) -> int:
    site = web.TCPSite(
        runner, address.host, address.port, ssl_context=address.ssl_context(), backlog=512
    )
    try:
        await site.start()
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {address.host}:{address.port}: {error.strerror}; choose another "
            "--port"
        ) from None
    return int(runner.addresses[0][1])


async def _until(stop: asyncio.Event, state: ServerState) -> None:
    wait_s = _TICK_S
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), wait_s)
        wait_s = state.tick(_TICK_S)
        if state.failure is not None:
            raise state.failure


class DiLoCoServer:
    """A server in a thread of this process, for tests and notebooks.

    with DiLoCoServer(ServerOptions(folder, Rules(workers=2))) as server:
        ...  # workers at server.address
    """

    def __init__(self, options: ServerOptions, address: Address | None = None) -> None:
        self._options, self._address = options, address or Address(port=0)
        self._ready = threading.Event()
        self._end: Callable[[], object] = lambda: None
        """Asks the loop to end."""
        self._failure: BaseException | None = None
        self._save_at_end = True
        self.port = 0
        self._thread = threading.Thread(target=self._run, name="diloco-server", daemon=True)

    @property
    def address(self) -> str:
        """The server's address as `host:port`, once it listens."""
        return f"{self._address.host}:{self.port}"

    def start(self) -> DiLoCoServer:
        """Start the thread and return when it listens, or raise the error that made it end."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def stop(self, *, save: bool = True) -> None:
        """End it; without `save`, as if it had been killed between two rounds."""
        self._save_at_end = save
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._end()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> DiLoCoServer:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        self._end = lambda: loop.call_soon_threadsafe(stop.set)

        def ready(port: int) -> None:
            self.port = port
            self._ready.set()

        await serve(self._options, self._address, ready, stop, lambda: self._save_at_end)


def run_until_signal(
    options: ServerOptions, address: Address, ready: Callable[[int], None]
) -> None:
    """Serve in this thread until SIGTERM or SIGINT, then save. Raises as `serve`."""

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(options, address, ready, stop)

    asyncio.run(main())
