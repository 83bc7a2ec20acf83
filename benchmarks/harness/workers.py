"""Functions that run in processes of their own, for what must not share a process.

A worker calls `function(line, **arguments)`. `line` is its connection to us: what it sends on it
are events, and what it returns, or the error that ends it, comes last. Each is a fresh Python, so
imports are timed as a user sees them, and a killed worker takes nothing along.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Worker", "WorkerFailed", "results"]

_fresh = multiprocessing.get_context("spawn")


class WorkerFailed(RuntimeError):
    """A worker ended by an error, was lost, or is not done in time. Holds what it said."""


@dataclass(frozen=True)
class _Returned:
    value: Any


@dataclass(frozen=True)
class _Raised:
    text: str


class Worker:
    """One process. As a context it is killed at the end, if it still lives."""

    def __init__(self, function: Callable[..., Any], **arguments: Any) -> None:
        self.line, theirs = _fresh.Pipe()
        self.returned: Any = None
        """What the function returned, once `ended`."""
        self.ended = False
        descriptor, path = tempfile.mkstemp(prefix="benchmark-", suffix=".stderr")
        os.close(descriptor)
        self._stderr = Path(path)
        self.began_s = time.monotonic()
        """When its process was created, on the clock that all processes share."""
        self._process = _fresh.Process(
            target=_run, args=(function, theirs, arguments, path), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self.line.close()
        self._stderr.unlink(missing_ok=True)

    def events(self, timeout_s: float) -> list[Any]:
        """What it has sent since the last call; waits at most `timeout_s` for the first.

        Raises:
            WorkerFailed: it ended by an error, or without a word.
        """
        found: list[Any] = []
        while not self.ended and self.line.poll(0 if found else timeout_s):
            message = self._receive()
            if isinstance(message, _Returned):
                self.returned, self.ended = message.value, True
            else:
                found.append(message)
        return found

    def event(self, timeout_s: float) -> Any:
        """The one thing that it sends next.

        Raises:
            WorkerFailed: it ended, or says nothing in time.
        """
        found = self.events(timeout_s)
        if len(found) != 1:
            raise WorkerFailed(f"{len(found)} events in {timeout_s:g} s, not 1:\n{self.said()}")
        return found[0]

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL; it is gone on return."""
        self._process.kill()
        self._process.join()

    def said(self) -> str:
        """The end of what it wrote to its standard error."""
        return self._stderr.read_text(errors="replace")[-4000:]

    def _receive(self) -> Any:
        try:
            message = self.line.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise WorkerFailed(f"a worker ended with code {code}:\n{self.said()}") from None
        if isinstance(message, _Raised):
            raise WorkerFailed(f"{message.text}\n{self.said()}")
        return message


def results(workers: Sequence[Worker], *, timeout_s: float) -> list[Any]:
    """What each returns, in order.

    Raises:
        WorkerFailed: the first that fails, or when not all are done in `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while running := [worker for worker in workers if not worker.ended]:
        left = deadline - time.monotonic()
        if left <= 0:
            said = "\n".join(worker.said() for worker in running)
            raise WorkerFailed(f"{len(running)} workers are not done in {timeout_s:g} s:\n{said}")
        wait([worker.line for worker in running], left)
        for worker in running:
            worker.events(0)
    return [worker.returned for worker in workers]


def _run(
    function: Callable[..., Any], line: Connection, arguments: dict[str, Any], stderr: str
) -> None:
    with open(stderr, "wb") as file:
        os.dup2(file.fileno(), 2)
    # When nobody listens to us any more, nobody wants to hear of it either.
    with suppress(BrokenPipeError):
        try:
            line.send(_Returned(function(line, **arguments)))
        except Exception:
            line.send(_Raised(traceback.format_exc()))
