"""A managed all-reduce: the sum travels, the division follows it, whoever waits and whether or not.

Three can finish it, and exactly one does: `wait`, the completion of its future, or the vote, which
finishes every average of its step. So an average is an average even when nobody waits for it.
A failure is the error of the step that started it: never of a later one, never a raise.

When a connection ends, gloo fails what is pending, but overlooks an operation that sends in that
very moment, which then waits for its whole timeout. So what takes long is looked at now and then,
and given up when its members are gone.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
from torch.distributed import Work
from torch.futures import Future

from torchft.errors import CollectiveError
from torchft.futures import call_after
from torchft.ledger import Bucket
from torchft.process_group.account import paid_by

if TYPE_CHECKING:
    from torchft.transaction import Transaction

__all__ = ["Average", "Done", "Members"]

_LOOK_S = 0.05
_LOOKS_WITHOUT_A_MEMBER = 10
"""So long may it take to end what a lost member has done its part of."""


class Members(Protocol):
    """Among whom something is averaged."""

    @property
    def retired(self) -> bool:
        """They were abandoned."""
        ...

    @property
    def lost(self) -> bool:
        """One of them has left."""
        ...


class Average(Work):
    """An all-reduce under way; afterwards `tensor` holds the result, divided by `divisor`."""

    def __init__(
        self,
        transaction: Transaction,
        work: Work,
        tensor: torch.Tensor,
        divisor: int,
        members: Members | None = None,
        *,
        sent: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self._transaction = transaction
        self._work = work
        self._tensor = tensor
        self._sent = tensor if sent is None else sent
        """What is reduced in place, if not the tensor itself."""
        self._divisor = divisor
        self._once = threading.Lock()
        self._finished = False
        self._members = members
        self._lost_looks = 0
        self._future: Future[torch.Tensor] | None = None
        self._answered = False

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait, at most `timeout`, and divide. Returns True; a failure discards the step."""
        if not self._finished:
            try:
                # Who waits may have to start the second half.
                paid = paid_by(self._transaction.account)
                with self._transaction.ledger.spending(Bucket.COMMUNICATE), paid:
                    self._await(timeout)
            except Exception as error:
                self._finish(error)
            else:
                self._finish(None)
        return True

    def get_future(self) -> Future[torch.Tensor]:
        """Completes by itself with the averaged tensor; after a failure, with it as it is."""
        if self._future is None:
            self._future = _future_on(self._tensor)
            self._work.get_future().add_done_callback(self._complete)
            if self._members is not None:
                call_after(_LOOK_S, self._look)
        return self._future

    def synchronize(self) -> None:
        """The same as `wait`."""
        self.wait()

    def block_current_stream(self) -> None:
        """The same as `wait`: the current stream sees the averaged tensor."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the result is there."""
        return self._finished

    def _complete(self, arrived: Future) -> None:
        try:
            arrived.wait()
        except Exception as error:
            self._finish(error)
        else:
            self._finish(None)
        self._answer()

    def _answer(self) -> None:
        with self._once:
            answered, self._answered = self._answered, True
        if not answered:
            assert self._future is not None
            self._future.set_result(self._tensor)

    def _await(self, timeout: timedelta | None) -> None:
        until = time.monotonic() + timeout.total_seconds() if timeout else float("inf")
        while True:
            began = time.monotonic()
            patience_s = max(0.001, min(_LOOK_S, until - began))
            try:
                self._work.wait(timedelta(seconds=patience_s))
                return
            except Exception as error:
                now = time.monotonic()
                # One that comes before its time is no timeout. Torch counts whole milliseconds.
                if now - began < patience_s - 0.002 or now >= until - 0.002:
                    raise
                if self._is_hopeless():
                    raise CollectiveError("a member left in the middle of it") from error

    def _look(self) -> None:
        """Without anybody waiting: see that the future completes."""
        if self._answered:
            return
        if self._finished or self._is_hopeless():
            self._finish(CollectiveError("a member left in the middle of it"))
            self._answer()
        else:
            call_after(_LOOK_S, self._look)

    def _is_hopeless(self) -> bool:
        if self._members is None:
            return False
        self._lost_looks += self._members.lost
        return self._members.retired or self._lost_looks >= _LOOKS_WITHOUT_A_MEMBER

    def _finish(self, error: Exception | None) -> None:
        with self._once:
            if self._finished:
                return
            if error is None and self._sent is not self._tensor:
                self._tensor.copy_(self._sent)
            if error is None and self._divisor != 1:
                self._tensor.div_(self._divisor)
            self._finished = True
        # The first error is the cause; those that come of abandoning the rest add nothing.
        if error is not None and not self._transaction.failed:
            failed = CollectiveError(
                f"the all-reduce of {tuple(self._tensor.shape)} failed: {error}"
            )
            failed.__cause__ = error
            self._transaction.report(failed)


class Done(Work):
    """A collective that has nothing to do: the tensor stays as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def wait(self, timeout: timedelta | None = None) -> bool:
        """True."""
        return True

    def get_future(self) -> Future[torch.Tensor]:
        """Already there."""
        future = _future_on(self._tensor)
        future.set_result(self._tensor)
        return future

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def block_current_stream(self) -> None:
        """Nothing to wait for."""

    def is_completed(self) -> bool:
        """True."""
        return True


def _future_on(tensor: torch.Tensor) -> Future[torch.Tensor]:
    """A future that orders streams when its value lies on a GPU."""
    return Future() if tensor.device.type == "cpu" else Future(devices=[tensor.device])
