"""How a rank finds its group."""

from __future__ import annotations

import signal
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from helpers.coordination import free_port

from torchft.replica_group import _store


class Interrupted(Exception):
    """What a signal handler raises."""


def test_a_store_that_is_not_there_is_named() -> None:
    port = free_port()
    with pytest.raises(TimeoutError, match=rf"127\.0\.0\.1:{port}.*is torchrun running there"):
        _store("127.0.0.1", port, timedelta(seconds=1))


def test_a_signal_is_heard_while_the_store_is_waited_for() -> None:
    def interrupt(*_: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    began = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            _store("127.0.0.1", free_port(), timedelta(seconds=5))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 4
    # The attempt that was left behind is inside torch: this process must not end before it.
    for thread in threading.enumerate():
        if thread.name == "torchft-attempt":
            thread.join(30)
