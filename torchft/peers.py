"""Whom a strategy talks to: the joint between strategies and everything that can run them.

`Peers.open` begins a round among the groups that are there now. In it a strategy averages or
gathers tensors, and `close` is the vote. A round has its own members and its own error: a failure
inside it is never raised into the training loop, it makes `close` return False.

    round = peers.open(Place.AFTER)
    average = round.average([delta])       # asynchronous
    (delta,) = average.wait()              # this average, whatever other rounds do
    if round.close():                      # the vote
        ...                                # apply

A round owns the tensors it is handed until it is closed: it may average them in place, so a
strategy hands over scratch buffers and never its weights. All tensors carry one leading dimension
of *nodes*: 1 in a process of its own, N in the simulator, where one process holds N nodes.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from torchft.finite import are_finite

if TYPE_CHECKING:
    from torchft.quantization import Codec

__all__ = ["FormedAtOnce", "Handle", "Peers", "Place", "Round"]


class Place(enum.Enum):
    """Where in a step a strategy communicates, and so what a healed group can contribute."""

    BEFORE = "before the inner step"
    """Gradients. A group that heals when the round opens computes them on the healed weights."""

    AFTER = "after the inner step"
    """Weights or deltas. A group that heals when the round opens has nothing of its own to give:
    it takes part in every collective with zeros and is not counted."""


class Handle(Protocol):
    """An average or a gathering under way."""

    def wait(self) -> list[Tensor]:
        """Wait for the result. After the round's error: the tensors as they are, never a raise."""
        ...

    def is_finite(self) -> bool:
        """Whether an average that has been waited for holds neither NaN nor infinity. Peers that
        judge what arrives say what they found, or that nobody looks; others look now."""
        return are_finite(self.wait())

    def advance(self) -> None:
        """Begin the second part of what travels in two, when the first has arrived. All nodes say
        so at the same clock, in the same order; else `wait` does it. What travels in one has
        nothing to advance."""
        return


class Round(Protocol):
    """One transaction among the members that opened it."""

    @property
    def bootstrap(self) -> bool:
        """True when every member is new: all have just been given equal state and nobody has
        anything to contribute. Such a round is neither used nor closed."""
        ...

    @property
    def final_sync(self) -> bool:
        """True when others end their run in it: whoever is behind has been given their state,
        nothing is averaged, and no close commits. False while it forms."""
        ...

    @property
    def formed(self) -> bool:
        """False while it forms in the background, its members unknown: what is sent then waits."""
        ...

    def meet(self) -> bool:
        """Wait until it has formed. True, once: this group was behind and has just been given a
        donor's state, or failed to load it, so what it sends in this round must be made anew.

        Raises whatever kept it from forming.
        """
        ...

    @property
    def failed(self) -> bool:
        """True when this group could not heal, or has another error already. It takes part for the
        others' sake, and its own close discards the round."""
        ...

    def average(
        self,
        tensors: Sequence[Tensor],
        codec: Codec | None = None,
        error_feedback: Sequence[Tensor] | None = None,
    ) -> Handle:
        """Mean over the participating nodes, `[rows, ...]` → `[1 or rows, ...]`, maybe in place.

        With a codec that is `torchft.quantization.quantized_mean` of the members' rows.
        `error_feedback` has then a buffer for each tensor, of its shape, fp32 or fp64. In: the
        exact values. Out, when the wait is over: the quantisation error.

        Raises:
            SettingsError: the codec cannot hold a tensor's dtype. Nothing has been sent.
        """
        ...

    def gather(self, tensors: Sequence[Tensor]) -> Handle:
        """The participants' rows only, in participating order: `[rows, ...]` → `[n, ...]`."""
        ...

    def average_within(
        self, tensors: Sequence[Tensor], islands: Callable[[int], list[list[int]]]
    ) -> Handle:
        """Mean within each island, `[rows, ...]` → `[rows, ...]`. `islands(participants)` says who
        is together, as positions among the participants.

        Raises:
            SettingsError: these peers can only average among all.
        """
        ...

    def carried(self) -> dict[str, Any]:
        """While it is open: what a node that heals must know of it, besides its result, to close
        it when the others do. Plain data, for `Peers.take_over`."""
        ...

    def fail(self, error: Exception) -> None:
        """Give the round up: whoever waits in it is freed, and every close discards it. After a
        close that committed, this group could not apply it, and heals from the others."""
        ...

    def close(self) -> bool:
        """Vote. True: committed by all ranks of this group, apply. False: discard."""
        ...


class FormedAtOnce:
    """Of rounds that have formed when `Peers.open` returns."""

    @property
    def formed(self) -> bool:
        """True: the round formed before it was returned."""
        return True

    def meet(self) -> bool:
        """There is nothing to wait for."""
        return False


class Peers(Protocol):
    """The other members that a strategy exchanges numbers with."""

    def compare(self, setting: str, value: str) -> None:
        """Before the first round: a setting that decides about what travels. Groups that meet with
        another value are refused before any number is mixed."""
        ...

    def open(self, place: Place) -> Round:
        """Begin a round. It may heal this group first: state that a strategy registered is then
        loaded before `open` returns, so read clocks and weights only afterwards. Or it returns at
        once, and the round forms in the background: then `Round.meet` heals, and until all have met
        neither shared state nor the rounds that are open may change.

        Rounds that are open still need not be closed before. Their members stay theirs: one that
        lost a member before it closes comes to nothing for all that remain."""
        ...

    def take_over(self, carried: dict[str, Any]) -> Round:
        """While state of a donor is loaded: a round that the donor has open, by its `carried`. All
        that is left to do with it is to close it."""
        ...
