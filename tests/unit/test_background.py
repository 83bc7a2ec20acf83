"""The background thread: order, errors, an end, and never a reason for a process to stay."""

from __future__ import annotations

import threading

import pytest
from helpers.coordination import Child

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


def test_a_call_that_never_ends_does_not_hold_the_process() -> None:
    code = (
        "import threading; from torchft.manager.background import Background\n"
        "Background('test').submit(threading.Event().wait)\nprint('end')"
    )
    with Child(code) as child:
        assert child.line() == "end"
        assert child.end() == 0, child.stderr
