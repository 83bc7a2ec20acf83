"""A unit test starts no process and opens no socket: one that does fails and says what it did."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Set
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

FORBIDDEN = {
    *("socket.bind", "socket.connect", "socket.sendto"),
    *("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"),
}
"""Audit events of the interpreter. What Rust and gloo open raises none."""

ASKED_ONCE = {"uname", "fc-list"}
"""Programs that libraries run when they are first imported, whichever test that is in."""

seen: deque[str] = deque(maxlen=20)
"""What of that the running test has done."""


def _note(
    event: str,
    given: tuple[Any, ...],
    forbidden: Set[str] = FORBIDDEN,
    asked: Set[str] = ASKED_ONCE,
) -> None:
    """As defaults the two outlive this module: the interpreter ends with the hook in place."""
    if event in forbidden and not (given and given[0] in asked):
        seen.append(" ".join([event, *map(str, given[1:2])]))  # the address, or the command


sys.addaudithook(_note)
_start = BaseProcess.start


def _start_noted(process: BaseProcess) -> None:
    seen.append(f"multiprocessing {process.name}")  # a spawned one raises no audit event
    _start(process)


BaseProcess.start = _start_noted  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    seen.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if seen:
        pytest.fail(f"{item.nodeid} belongs in tests/integration: {'; '.join(seen)}", pytrace=False)
    return outcome
