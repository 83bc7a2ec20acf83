"""A lighthouse in a process of its own, by the command that users start, so that its CPU
time and its memory can be told from its clients'."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

__all__ = ["Lighthouse", "lighthouse"]

_COMMAND = [sys.executable, "-m", "torchft.cli.lighthouse"]  # what torchft_lighthouse runs
_STARTS_IN_S = 30.0
_ENDS_IN_S = 5.0


@dataclass(frozen=True)
class Lighthouse:
    """One that listens."""

    pid: int
    address: str
    """`http://127.0.0.1:port`."""
    listening_after_s: float
    """From the start of its process."""


@contextmanager
def lighthouse(
    *,
    min_replicas: int,
    join_timeout_ms: int = 10_000,
    heartbeat_timeout_ms: int = 5_000,
    command: Sequence[str] = _COMMAND,
) -> Iterator[Lighthouse]:
    """A lighthouse that listens on a free port until the block ends, started by `command`."""
    port = _free_port()
    flags = {
        "--bind": f"127.0.0.1:{port}",
        "--min_replicas": str(min_replicas),
        "--join_timeout_ms": str(join_timeout_ms),
        "--heartbeat_timeout_ms": str(heartbeat_timeout_ms),
    }
    words = [*command, *(word for flag in flags.items() for word in flag)]
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)
        try:
            _wait_until_it_listens(process, port, log)
            took = time.perf_counter() - began
            yield Lighthouse(process.pid, f"http://127.0.0.1:{port}", took)
        finally:
            _end(process)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.perf_counter() + _STARTS_IN_S
    while time.perf_counter() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None:
                log.seek(0)
                said = log.read().decode(errors="replace")
                raise RuntimeError(f"the lighthouse ended before it listened:\n{said}") from None
            time.sleep(0.0005)
    raise TimeoutError(f"the lighthouse does not listen after {_STARTS_IN_S:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_ENDS_IN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
