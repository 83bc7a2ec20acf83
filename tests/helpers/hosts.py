"""Tests on hosts of their own: network namespaces, where this machine and its user allow them."""

from __future__ import annotations

import gc
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import pytest

from torchft.network_namespaces import Host, missing

__all__ = ["needs_hosts", "on"]

T = TypeVar("T")
_why_not = missing()
needs_hosts = pytest.mark.skipif(_why_not is not None, reason=f"no network of hosts: {_why_not}")


def on(host: Host, act: Callable[[], T], *, deadline_s: float = 100.0) -> T:
    """What `act` returns, run in a process that lives on `host`; its error fails the test."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_live, args=(host, act, theirs))
    process.start()
    theirs.close()
    try:
        assert mine.poll(deadline_s), f"not done within {deadline_s:g} s"
        result, raised = mine.recv()
        assert raised is None, raised
        return result  # type: ignore[no-any-return]
    finally:
        process.join(5)
        process.kill()
        process.join()


def _live(host: Host, act: Callable[[], Any], line: Connection) -> None:
    gc.freeze()
    try:
        host.enter()
        line.send((act(), None))
    except BaseException:
        line.send((None, traceback.format_exc()))
