"""What only the thread that trains may do, when a quorum that forms beside it needs that.

A model's state is read by whoever trains it: FSDP2 changes in the forward and backward pass what a
state_dict finds, and a CUDA stream orders only what was given to it. So the thread that forms a
quorum asks, and the training thread answers where it enters the manager anyway: while it waits for
that quorum, and before its optimizer changes the parameters. Without a question nothing is done.

    quorum's thread      call(read) ─────────────► waits ───► its result
    training thread          … forward, backward …  wait(ready): read()

In the backward pass of a model that FSDP2 shards there is no such moment (`may_not_wait`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch

from torchft.sharded import is_any_fully_sharded

__all__ = ["NotReached", "TrainingThread"]

T = TypeVar("T")

_NO_BACKWARD = -1


class NotReached(Exception):
    """The training thread did not come to a place where it may answer."""


class TrainingThread:
    """Hands one call at a time to the thread that trains."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards the two below; notified when they change
        self._asked: tuple[Future[Any], Callable[[], Any]] | None = None
        self._closed = False

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """From another thread: what `function` returns or raises on the training thread.

        Raises:
            NotReached: it did not begin within `timeout_s`, or training has ended.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise NotReached("training has ended")
            self._asked = future, function
            self._changed.notify_all()
        wait([future], timeout_s)
        if future.cancel():
            raise NotReached(f"the training loop did not come to the manager in {timeout_s:g} s")
        return future.result()

    def serve(self) -> None:
        """On the training thread: answer, if anything was asked for."""
        if self._asked is None:  # every optimizer step comes here
            return
        with self._changed:
            asked, self._asked = self._asked, None
        if asked is not None:
            _answer(*asked)

    def wait(self, reached: threading.Event) -> None:
        """On the training thread: wait until `reached` is set, and answer meanwhile. Who sets it
        calls `wake`."""
        while not reached.is_set():
            with self._changed:
                self._changed.wait_for(lambda: reached.is_set() or self._asked is not None)
            self.serve()

    def wake(self) -> None:
        """Let the training thread look again, if it waits."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Training has ended: nothing is answered any more."""
        with self._changed:
            self._closed, asked, self._asked = True, self._asked, None
        if asked is not None and asked[0].cancel():
            asked[0].set_running_or_notify_cancel()  # else nobody who waits is told

    @staticmethod
    def may_not_wait() -> bool:
        """Whether this thread is in a backward pass in which the state cannot be read, since a
        model is sharded by FSDP2: it has parameters together now that it needs so afterwards."""
        return torch._C._current_graph_task_id() != _NO_BACKWARD and is_any_fully_sharded()


def _answer(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
