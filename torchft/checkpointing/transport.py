"""What every checkpoint transport promises: live state from a healthy peer to one that heals.

A donor opens a *window* with `send_checkpoint` and closes it with `disallow_checkpoint`. Between
the two its state is being read and must not change. A healing peer calls `recv_checkpoint` with
the metadata that the donor published; it may ask before the window opens and then waits.

A transport moves whole states only: what `recv_checkpoint` returns is complete and checked, or it
raises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Generic, TypeVar

__all__ = ["LIMIT", "SLOWEST", "CheckpointTransport", "longest_s"]

LIMIT = 10
"""A transfer may take so many times its timeout, as long as something moves within each."""
SLOWEST = 128 * 1024
"""And longer than that, if it has moved so many bytes a second, which is 1 Mbit/s."""

T = TypeVar("T")


def longest_s(limit_s: float, nbytes: int) -> float:
    """So many seconds may a transfer have taken that has moved `nbytes`.

    A timeout bounds each wait for a byte, whatever the size of the state; this ends what only
    drips. `limit_s` is `LIMIT` times the timeout.
    """
    return limit_s + nbytes / SLOWEST


class CheckpointTransport(ABC, Generic[T]):
    """Moves a state dict of type `T` between replica groups."""

    bytes_sent: int = 0
    """Bytes of state that this end has handed to the wire, headers included."""
    bytes_received: int = 0
    """Bytes of state that this end has read from the wire, headers included."""

    @abstractmethod
    def metadata(self) -> str:
        """What a healing peer must know to reach this donor. It travels through the quorum."""

    @abstractmethod
    def send_checkpoint(
        self, dst_ranks: list[int], step: int, state_dict: T, timeout: timedelta
    ) -> None:
        """Offer `state_dict` as the state of `step` to the replica ranks `dst_ranks`.

        It may return before anything has been sent. The state must not change until
        `disallow_checkpoint` has returned.

        Raises:
            TypeError: a value cannot travel; the message names its place in the state dict.
        """

    def check_state(self, state_dict: T) -> None:
        """See that `send_checkpoint` could encode `state_dict`, without copying a tensor.

        Raises:
            TypeError, ValueError: a value cannot travel; the message names its place.
        """

    def refuse_checkpoint(
        self, dst_ranks: list[int], step: int, reason: str, timeout: timedelta
    ) -> None:
        """Tell the replica ranks `dst_ranks` that there is no state of `step` to be had here.

        Instead of `send_checkpoint`. A transport without it lets them wait for their deadline.
        """

    @abstractmethod
    def disallow_checkpoint(self) -> None:
        """End the window: once this has returned nobody reads the state, so it may change.

        It never raises: by the time it is called the group has decided its step.
        """

    @abstractmethod
    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> T:
        """The state of `step` from replica rank `src_rank`, on the CPU.

        Raises:
            DonorRefusedError: the donor offers another step, or cannot read its state.
            HealError: the donor is gone, or sent something unreadable.
            TransferTimeoutError: nothing arrived within `timeout`, or hardly anything for `LIMIT`
                times that (`longest_s`).
        """

    def shutdown(self, wait: bool = True) -> None:
        """Let go of ports and threads, and wait for them if `wait`. Calling it twice is fine."""
