"""What the thread that forms a quorum has done on the thread that trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

from torchft.manager import training_thread
from torchft.manager.live_state import LiveState
from torchft.manager.training_thread import NotReached, TrainingThread


def beside(call: Callable[[], Any], reached: threading.Event, training: TrainingThread) -> Any:
    """What `call` returns on another thread, which then lets this one go on."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        future.add_done_callback(lambda _: (reached.set(), training.wake()))
        training.wait(reached)
        return future.result()


def test_who_waits_for_the_quorum_reads_for_it() -> None:
    training, reached = TrainingThread(), threading.Event()
    thread = beside(lambda: training.call(threading.get_ident, 10.0), reached, training)
    assert thread == threading.get_ident()


def test_an_error_goes_to_who_asked() -> None:
    training, reached = TrainingThread(), threading.Event()

    def read() -> Any:
        raise KeyError("ema")

    with pytest.raises(KeyError, match="ema"):
        beside(lambda: training.call(read, 10.0), reached, training)


def test_state_is_read_before_an_optimizer_changes_it() -> None:
    state = LiveState(timedelta(seconds=10))
    threads: list[int] = []
    state.register("w", print, lambda: threads.append(threading.get_ident()))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(state.training.call, lambda: state.collect(dict), 10.0)
        while state.training._asked is None:
            pass
        state.disallow_read()
        state.allow_read()
        assert asked.result(10.0) == {"user": {"w": None}, "torchft": {}}
    assert threads == [threading.get_ident()]


def test_a_training_thread_that_does_not_come_is_an_error_and_not_asked_later() -> None:
    training = TrainingThread()
    with pytest.raises(NotReached, match=r"did not come to the manager in 0\.01 s"):
        training.call(lambda: pytest.fail("too late"), 0.01)
    training.serve()


def test_nobody_is_asked_after_the_end() -> None:
    training = TrainingThread()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(training.call, dict, 10.0)
        while training._asked is None:
            pass
        training.close()
        with pytest.raises(NotReached):
            asked.result(10.0)
    with pytest.raises(NotReached, match="training has ended"):
        training.call(dict, 10.0)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_sharded_model_is_not_read_in_a_backward_pass(
    monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    monkeypatch.setattr(training_thread, "is_any_fully_sharded", lambda: sharded)
    seen: list[bool] = []
    weight = torch.ones(2, requires_grad=True)
    weight.register_hook(lambda _: seen.append(TrainingThread.may_not_wait()))
    weight.sum().backward()
    assert seen == [sharded]
    assert not TrainingThread.may_not_wait()
