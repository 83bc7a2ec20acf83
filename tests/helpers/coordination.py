"""A small world of servers for tests: lighthouses, groups, and Python children that tell events.

A child prints one word a line when something has happened; the test waits for that word, with a
deadline, instead of sleeping.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from types import TracebackType
from typing import Any

from torchft.coordination import LighthouseServer, ManagerClient, ManagerServer, QuorumResult

__all__ = ["Child", "ask", "at_once", "free_port", "group", "lighthouse", "seconds"]

LIMIT = 30.0
"""Seconds after which a test gives up on an event."""


def seconds(n: float) -> timedelta:
    return timedelta(seconds=n)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def lighthouse(
    min_replicas: int = 1, *, bind: str = "127.0.0.1:0", **options: int
) -> Iterator[LighthouseServer]:
    server = LighthouseServer(bind, min_replicas, **options)
    try:
        yield server
    finally:
        server.shutdown()


@contextlib.contextmanager
def group(
    lighthouse_addr: str,
    name: str = "a:1",
    *,
    world_size: int = 1,
    quorum_retries: int = 0,
    heartbeat: float = 0.05,
) -> Iterator[ManagerServer]:
    server = ManagerServer(
        replica_id=name,
        lighthouse_addr=lighthouse_addr,
        hostname="127.0.0.1",
        bind="127.0.0.1:0",
        store_addr=f"store-of-{name}",
        world_size=world_size,
        heartbeat_interval=seconds(heartbeat),
        connect_timeout=seconds(5),
        quorum_retries=quorum_retries,
    )
    try:
        yield server
    finally:
        server.shutdown()


def ask(
    client: ManagerClient,
    rank: int = 0,
    *,
    step: int = 0,
    timeout: float = LIMIT,
    shrink_only: bool = False,
    init_sync: bool = False,
    commit_failures: int = 0,
) -> QuorumResult:
    return client._quorum(
        group_rank=rank,
        step=step,
        checkpoint_metadata=f"state of rank {rank}",
        shrink_only=shrink_only,
        init_sync=init_sync,
        commit_failures=commit_failures,
        timeout=seconds(timeout),
    )


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Runs calls side by side; returns their results in order, an exception as itself."""
    with ThreadPoolExecutor(len(calls)) as threads:
        running: list[Future[Any]] = [threads.submit(call) for call in calls]
        return [future.exception() or future.result() for future in running]


class Child:
    """A Python child that runs `code`; its stdout is read line by line, its stderr kept."""

    def __init__(self, code: str, *args: str, **env: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._keep, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()

    def line(self) -> str:
        """The next line of its stdout."""
        try:
            return self._lines.get(timeout=LIMIT)
        except queue.Empty:
            raise AssertionError(f"the child said nothing; stderr: {self.stderr}") from None

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Waits for its end; returns its exit code."""
        code = self.process.wait(LIMIT)
        for reader in self._readers:
            reader.join(LIMIT)
        return code

    @property
    def stderr(self) -> str:
        return "".join(self._err)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))

    def _keep(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._err.append(line)
