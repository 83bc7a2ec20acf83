"""When a state may be read: opened by the donor's step, closed before the state changes.

    closed ── open(offer) ──► open ── close() ──► closed        shut: closed for good
           ── refuse(why) ──► nothing to be had, which readers are told at once

A reader takes a *lease* for the step it wants. Before that is offered it waits, also while an older
one is; when a later one is offered it is refused. `close` lets no new reader in, waits for those
inside, and cuts off whoever is still there at its deadline: then the healing peer's step fails and
it heals again, while the donor, whose step has been decided, goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from torchft.errors import StepError

__all__ = ["Refused", "Unreadable", "Window", "WrongStep"]

T = TypeVar("T")

_CUT_GRACE_S = 1.0  # A cut reader needs microseconds to notice.


class Refused(StepError):
    """The window does not offer what a reader wants; the message says why."""


class Unreadable(Refused):
    """There is no state to be offered; the message says why."""


class WrongStep(Refused):
    """The window offers another step; the message names both."""


class _Lease:
    def __init__(self, cut: Callable[[], None]) -> None:
        self.cut = cut


class Window(Generic[T]):
    """Offers one value at a time. Any thread may call any method."""

    def __init__(self) -> None:
        # Guards everything below; notified at each change.
        self._changed = threading.Condition()
        self._step: int | None = None  # None: closed
        self._offer: T | None = None
        self._refusal: str | None = None
        self._leases: set[_Lease] = set()
        self._shut = False

    def open(self, step: int, offer: T) -> None:
        """Offer `offer` as the state of `step`. The window must be closed."""
        with self._changed:
            self._step, self._offer = step, offer
            self._changed.notify_all()

    def refuse(self, step: int, reason: str) -> None:
        """There is no state of `step` to be had, because of `reason`. The window must be closed."""
        with self._changed:
            self._step, self._refusal = step, reason
            self._changed.notify_all()

    def relabel(self, step: int) -> bool:
        """Let what is offered count as the state of `step`. False: nothing is offered."""
        with self._changed:
            if self._step is None:
                return False
            self._step = step
            self._changed.notify_all()
            return True

    @contextmanager
    def lease(self, step: int, *, timeout_s: float, cut: Callable[[], None]) -> Iterator[T]:
        """The offer for `step`. `cut` is called from another thread if the reader must end.

        Raises:
            WrongStep: a later step is offered, or still an older one after `timeout_s`.
            Unreadable: `refuse` was called for this step.
            Refused: nothing was offered within `timeout_s`.
        """
        lease = _Lease(cut)
        with self._changed:
            offer = self._await_offer(step, timeout_s)
            self._leases.add(lease)
        try:
            yield offer
        finally:
            with self._changed:
                self._leases.discard(lease)
                self._changed.notify_all()

    def close(self, timeout_s: float) -> int:
        """Let nobody in, wait for the readers inside, cut off the rest and say how many."""
        with self._changed:
            self._step = self._offer = self._refusal = None
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._leases, timeout_s)
            late = list(self._leases)
        for lease in late:
            lease.cut()
        with self._changed:
            self._changed.wait_for(lambda: not self._leases, _CUT_GRACE_S if late else 0)
        return len(late)

    def shut(self) -> None:
        """Close for good, now: readers inside are cut, those waiting are refused."""
        with self._changed:
            self._shut = True
        self.close(0.0)

    def _has_come_to(self, step: int) -> bool:
        return self._step is not None and self._step >= step

    def _await_offer(self, step: int, timeout_s: float) -> T:
        self._changed.wait_for(lambda: self._has_come_to(step) or self._shut, timeout_s)
        if self._shut:
            raise Refused("the donor is shutting down")
        if self._step == step and self._refusal is not None:
            raise Unreadable(self._refusal)
        if self._step is None or self._offer is None:
            raise Refused(f"the donor offered no state within {timeout_s:g} s")
        if self._step != step:
            raise WrongStep(f"serving {self._step} but got step={step}")
        return self._offer
