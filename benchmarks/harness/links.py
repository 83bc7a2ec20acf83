"""Replica groups on hosts behind slow links, and what passes those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from harness.workers import Worker
from torchft.network_namespaces import Host

__all__ = ["lighthouse_on"]

_STARTS_IN_S = 60.0


@contextmanager
def lighthouse_on(host: Host, *, min_replicas: int, heartbeat_timeout_ms: int) -> Iterator[str]:
    """A lighthouse on `host` until the block ends; its address."""
    arguments = {"min_replicas": min_replicas, "heartbeat_timeout_ms": heartbeat_timeout_ms}
    with Worker(_serve, host=host, **arguments) as worker:
        (address,) = worker.events(_STARTS_IN_S)
        yield address


def _serve(line: Connection, *, host: Host, **options: int) -> None:
    host.enter()
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind=f"{host.address}:0", join_timeout_ms=60_000, **options)
    line.send(server.address())
    line.recv()
