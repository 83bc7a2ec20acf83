"""Deadlines of futures and of blocks."""

from __future__ import annotations

import threading
import weakref
from datetime import timedelta

import pytest
import torch
from torch.futures import Future

from torchft.errors import MissingDeviceError
from torchft.futures import (
    _Timer,
    call_after,
    context_timeout,
    future_timeout,
    future_wait,
    stream_timeout,
)
from torchft.work import _DummyWork

SOON = timedelta(seconds=0.02)
LATE = timedelta(seconds=30)


def test_a_future_that_comes_in_time_is_passed_on() -> None:
    future: Future[int] = Future()
    limited = future_timeout(future, LATE)
    future.set_result(7)
    assert limited.wait() == 7


def test_a_future_that_is_there_already_is_passed_on() -> None:
    future: Future[int] = Future()
    future.set_result(7)
    assert future_timeout(future, LATE).wait() == 7


def test_a_future_that_fails_in_time_fails_the_limited_one() -> None:
    future: Future[int] = Future()
    limited = future_timeout(future, LATE)
    future.set_exception(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        limited.wait()


def test_a_future_that_comes_too_late_changes_nothing() -> None:
    future: Future[int] = Future()
    limited = future_timeout(future, SOON)
    with pytest.raises(TimeoutError, match=r"did not complete within 0\.02 s"):
        limited.wait()
    future.set_result(7)
    with pytest.raises(TimeoutError):
        limited.wait()


def test_deadlines_pass_in_their_order_and_not_in_that_of_their_setting() -> None:
    never: Future[int] = Future()
    order = []
    later = future_timeout(never, timedelta(seconds=0.06))
    sooner = future_timeout(never, SOON)
    noted = [
        later.then(lambda _: order.append("later")),
        sooner.then(lambda _: order.append("sooner")),
    ]
    for one in noted:
        one.wait()
    for limited in (later, sooner):
        with pytest.raises(TimeoutError):
            limited.wait()
    assert order == ["sooner", "later"]


def test_waiting_for_a_future_has_a_deadline() -> None:
    future: Future[int] = Future()
    with pytest.raises(TimeoutError, match="did not complete within"):
        future_wait(future, SOON)
    future.set_result(7)
    assert future_wait(future, SOON) == 7


def test_waiting_raises_the_futures_own_error() -> None:
    future: Future[int] = Future()
    future.set_exception(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        future_wait(future, LATE)


def test_a_block_that_takes_too_long_is_told_on_another_thread() -> None:
    told = threading.Event()
    with context_timeout(told.set, SOON):
        assert told.wait(30)


def test_a_block_that_ends_in_time_is_left_alone() -> None:
    told = threading.Event()
    with context_timeout(told.set, SOON):
        pass
    after = threading.Event()
    with context_timeout(after.set, 2 * SOON):
        assert after.wait(30)  # set later, so the first one's time has come too
    assert not told.is_set()


def test_all_deadlines_share_one_thread() -> None:
    never: Future[int] = Future()
    for _ in range(20):
        future_timeout(never, LATE)
    assert sum(thread.name == "torchft-timer" for thread in threading.enumerate()) == 1


def test_a_dummy_work_has_ended() -> None:
    work = _DummyWork([1, 2])
    assert work.wait(SOON)
    assert work.is_completed()
    assert work.get_future().wait() == work.result() == [1, 2]


class Held:
    """What a callback holds, such as an average with torch's work in it."""

    def late(self) -> None:
        raise AssertionError("its deadline is past the end of the process")


def test_a_process_that_ends_frees_what_deadlines_hold_before_python_shuts_down() -> None:
    timer, held = _Timer(), Held()
    timer.after(LATE, held.late)
    freed = weakref.ref(held)
    del held
    timer.end()
    assert freed() is None
    assert timer._thread is not None and not timer._thread.is_alive()
    timer.after(SOON, Held().late)
    assert not timer._thread.is_alive(), "nothing begins any more"


class _Stream:
    """An accelerator's stream whose work is done, or never."""

    def __init__(self, done: bool) -> None:
        self._done = done

    def record_event(self) -> _Stream:
        return self

    def query(self) -> bool:
        return self._done


@pytest.mark.parametrize("done", [True, False])
def test_a_stream_that_is_late_is_told(monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: _Stream(done))
    told, after = threading.Event(), threading.Event()
    stream_timeout(told.set, timedelta(seconds=0.01))
    call_after(0.01, after.set)  # entries fire in the order of their time
    assert after.wait(10)
    assert told.is_set() is not done


def test_a_stream_without_an_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(MissingDeviceError, match="context_timeout"):
        stream_timeout(lambda: None, timedelta(seconds=1))
