"""The manager as `Peers`: a strategy's round is a step that it takes from the manager.

Opening it forms a quorum, and heals this group when it is behind; closing it is the vote. Others
may be opened before it is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import Work

from torchft.collectives import as_bytes
from torchft.errors import SettingsError
from torchft.finite import are_finite
from torchft.manager.average import Average, is_finite
from torchft.manager.background_round import BackgroundRound
from torchft.peers import FormedAtOnce, Handle, Place

if TYPE_CHECKING:
    from torchft.manager import Manager
    from torchft.manager.open_step import OpenStep
    from torchft.quantization import Codec

__all__ = ["ManagedPeers", "ManagedRound"]


class ManagedPeers:
    """The groups that a manager meets at its lighthouse.

    `deterministic`: averages have the bits that the simulator has, where the groups are its nodes.
    As many bytes travel, and a little padding; adding one by one takes longer.

    `background`: rounds form, and what they send is sent, in the background, except the first one
    of a process. The manager is one with `use_async_quorum=True`, the strategy one recipe, with a
    delay.
    """

    def __init__(
        self, manager: Manager, *, deterministic: bool = False, background: bool = False
    ) -> None:
        self._manager = manager
        self._deterministic = deterministic
        self._background = background

    def compare(self, setting: str, value: str) -> None:
        """By the manager, whenever a process group is made."""
        self._manager.describe_setting(setting, value)

    def open(self, place: Place) -> ManagedRound | BackgroundRound:
        """Form a quorum. With `Place.AFTER` it waits for it, and heals first; in the background it
        does so only in the first one of this process.

        Raises whatever `Manager.start_quorum` raises: no quorum before the deadline.
        """
        if self._background and self._manager.has_met():
            self._manager.start_quorum(place=place, wait=False)
            return self._taken(met=False)
        while True:
            self._manager.start_quorum(place=place)
            opening = place is Place.AFTER and self._manager.is_opening()
            # A rank of this group that failed to heal votes no: then all its ranks open again.
            if not opening or self._manager.close_opening():
                return self._taken(opening=opening)

    def _taken(self, *, opening: bool = False, met: bool = True) -> ManagedRound | BackgroundRound:
        step = self._manager.take_step()
        taken = ManagedRound(step, opening, deterministic=self._deterministic)
        if opening or not self._background:
            return taken
        return BackgroundRound(taken, step, self._manager.in_background, met=met)

    def take_over(self, carried: dict[str, Any]) -> ManagedRound:
        """One of the donor's open rounds, while its state is loaded."""
        return ManagedRound(self._manager.take_over(**carried), opening=False)


class ManagedRound(FormedAtOnce):
    """A round that is one step of the manager."""

    def __init__(
        self, step: OpenStep, opening: bool = False, *, deterministic: bool = False
    ) -> None:
        self._step = step
        # A strategy knows the names of what is not finite, and reports it.
        self._average = partial(
            step.ordered_mean if deterministic else step.allreduce, reports=False
        )
        self._opening = opening
        self._committed = False

    @property
    def opening(self) -> bool:
        """True: every group is new and all are equal now; there is no step to close."""
        return self._opening

    @property
    def failed(self) -> bool:
        """An error of this step is known already."""
        return self._step.errored() is not None

    @property
    def bytes_sent(self) -> int:
        """Payload that its collectives have sent so far."""
        return self._step.transaction.account.bytes_sent

    def carried(self) -> dict[str, Any]:
        """Who takes part, and whether it failed."""
        return self._step.carried()

    def average(
        self,
        tensors: Sequence[Tensor],
        codec: Codec | None = None,
        unsaid: Sequence[Tensor] | None = None,
    ) -> _Averages:
        """Mean over the counted groups, in place; one all-reduce for each tensor."""
        if codec is None:
            return _Averages(list(tensors), [self._average(tensor) for tensor in tensors])
        for tensor in tensors:
            codec.check(tensor.dtype)
        owed = [None] * len(tensors) if unsaid is None else unsaid
        reduce = partial(self._step.allreduce, should_quantize=codec, reports=False)
        works = [reduce(t, unsaid=left) for t, left in zip(tensors, owed, strict=True)]
        return _Averages(list(tensors), works)

    def gather(self, tensors: Sequence[Tensor]) -> _Averages | _Gathered:
        """The counted groups' rows, `[1, …]` each → `[n, …]`, in participating order.

        All tensors, of whatever dtypes, travel as one.
        """
        if not tensors:
            return _Averages([], [])
        packed = torch.cat([as_bytes(tensor) for tensor in tensors])
        return _Gathered(tensors, *self._step.allgather(packed), judged=self._step.check_finite)

    def average_within(
        self, tensors: Sequence[Tensor], islands: Callable[[int], list[list[int]]]
    ) -> NoReturn:
        """Refuse: process groups average among all of a quorum.

        Raises:
            SettingsError: always.
        """
        raise SettingsError(
            "replica groups cannot average within islands yet: simulate this strategy, or leave "
            "the islands out"
        )

    def fail(self, error: Exception) -> None:
        """Discard the step, and free the groups that wait for this one in it."""
        if self._committed:
            self._step.fall_behind()
        else:
            self._step.report_error(error)

    def close(self) -> bool:
        """The vote of this group's ranks."""
        self._committed = self._step.should_commit()
        return self._committed


class _Averages(Handle):
    def __init__(self, tensors: list[Tensor], works: list[Work]) -> None:
        self._tensors = tensors
        self._works = works

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._tensors

    def is_finite(self) -> bool:
        return all(is_finite(work) for work in self._works)

    def advance(self) -> None:
        for work in self._works:
            if isinstance(work, Average):
                work.advance()


class _Gathered(Handle):
    def __init__(
        self, sent: Sequence[Tensor], work: Work, rows: list[Tensor], *, judged: bool
    ) -> None:
        self._sent = sent
        self._work = work
        self._rows = rows
        self._judged = judged
        self._gathered: list[Tensor] | None = None

    def is_finite(self) -> bool:
        return not self._judged or are_finite(self.wait())

    def wait(self) -> list[Tensor]:
        if self._gathered is None:
            self._gathered = self._arrived()
        return self._gathered

    def _arrived(self) -> list[Tensor]:
        self._work.wait()
        gathered, start = [], 0
        for sent in self._sent:
            stop = start + sent.nbytes
            # Memory of its own: a view of another dtype must begin at a multiple of its size.
            wire = torch.cat([row[start:stop] for row in self._rows])
            gathered.append(wire.view(sent.dtype).view(-1, *sent.shape[1:]))
            start = stop
        return gathered
