"""The background thread: order, errors, an end."""

from __future__ import annotations

import threading

import pytest

from torchft.manager.background import Background


def test_calls_run_in_order_on_one_thread() -> None:
    background = Background("test")
    ran: list[int] = []
    futures = [background.submit(ran.append, i) for i in range(20)]
    threads = background.submit(threading.get_ident), background.submit(threading.get_ident)
    assert [f.result(5) for f in futures] == [None] * 20
    assert ran == list(range(20))
    assert len({t.result(5) for t in threads} | {threading.get_ident()}) == 2
    background.shutdown()


def test_an_error_belongs_to_its_own_call() -> None:
    background = Background("test")
    failing, later = background.submit(int, "x"), background.submit(int, "7")
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result(5)
    assert later.result(5) == 7
    background.shutdown()


def test_shutdown_runs_what_was_given_and_ends_the_thread() -> None:
    background = Background("test")
    last = background.submit(int, "7")
    background.shutdown()
    assert last.done() and not background._thread.is_alive()
