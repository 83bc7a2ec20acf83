"""The manager as `Peers`: a strategy's round is a step that it takes from the manager.

Opening it forms a quorum, and heals this group when it is behind; closing it is the vote. Others
may be opened before it is closed.

A round may form in the background, while training goes on. Nobody waits for its quorum, for whoever
joins in it to heal, or for what is open to arrive before that, until an average is due. What it
sends begins in the background too, when it has formed: at all members in one order, both halves of
it, before the next one forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import Work

from torchft.collectives import as_bytes
from torchft.errors import SettingsError
from torchft.finite import are_finite
from torchft.ledger import Bucket
from torchft.manager.average import Average, is_finite
from torchft.manager.side_stream import SideStream
from torchft.peers import FormedAtOnce, Handle, Place

if TYPE_CHECKING:
    from torchft.manager import Manager
    from torchft.manager.queue import Steps
    from torchft.manager.step import Step
    from torchft.quantization import Codec

__all__ = ["BackgroundRound", "ManagerPeers", "ManagerRound"]

_FORMER_KEYS = {"counted": "participating"}
"""What a donor of an older version calls the values of `Step.carried`."""


class ManagerPeers:
    """The groups that a manager meets at its lighthouse.

    Args:
        deterministic: averages have the bits that the simulator has, where the groups are its
            nodes. As many bytes travel, and a little padding; adding one by one takes longer.
        background: rounds form, and what they send is sent, in the background, except the first
            one of a process. The manager is one with `use_async_quorum=True`, the strategy one
            recipe, with a delay.
    """

    def __init__(
        self, manager: Manager, *, deterministic: bool = False, background: bool = False
    ) -> None:
        self._manager = manager
        self._deterministic = deterministic
        self._background = background

    def compare(self, setting: str, value: str) -> None:
        """Have a setting compared with the other groups, whenever a process group is made."""
        self._manager.fingerprint.describe_setting(setting, value)

    def open(self, place: Place) -> ManagerRound | BackgroundRound:
        """Form a quorum. With `Place.AFTER` it waits for it, and heals first; in the background it
        does so only in the first one of this process.

        Raises whatever `Manager.start_quorum` raises: no quorum before the deadline.
        """
        steps = self._manager.steps
        if self._background and steps.has_met:
            self._manager.start_quorum(place=place, wait=False)
            return self._taken(met=False)
        while True:
            self._manager.start_quorum(place=place)
            step = steps.begun("open")
            bootstrap = place is Place.AFTER and step.plan.bootstrap
            # A rank of this group that failed to heal votes no: then all its ranks open again.
            if not bootstrap or steps.close(step, counts=False):
                return self._taken(bootstrap=bootstrap)

    def _taken(
        self, *, bootstrap: bool = False, met: bool = True
    ) -> ManagerRound | BackgroundRound:
        steps = self._manager.steps
        step = steps.take()
        taken = ManagerRound(steps, step, bootstrap, deterministic=self._deterministic)
        if bootstrap or not self._background:
            return taken
        return BackgroundRound(taken, steps, step, met=met)

    def take_over(self, carried: dict[str, Any]) -> ManagerRound:
        """Go on with one of the donor's open rounds, while its state is loaded."""
        steps = self._manager.steps
        named = {_FORMER_KEYS.get(key, key): value for key, value in carried.items()}
        return ManagerRound(steps, steps.take_over(**named), bootstrap=False)


class ManagerRound(FormedAtOnce):
    """A round that is one step of the manager."""

    def __init__(
        self, steps: Steps, step: Step, bootstrap: bool = False, *, deterministic: bool = False
    ) -> None:
        self._steps, self._step = steps, step
        # A strategy knows the names of what is not finite, and reports it.
        self._average = partial(
            step.ordered_mean if deterministic else step.allreduce, reports=False
        )
        self._bootstrap = bootstrap
        self._committed = False

    @property
    def bootstrap(self) -> bool:
        """True: every group is new and all are equal now; there is no step to close."""
        return self._bootstrap

    @property
    def final_sync(self) -> bool:
        """Others end their run in it: nothing is averaged, and whoever is behind has healed."""
        return self._step.formed and self._step.plan.final_sync

    @property
    def failed(self) -> bool:
        """An error of this step is known already."""
        return self._step.failed

    @property
    def bytes_sent(self) -> int:
        """Payload that its collectives have sent so far."""
        return self._step.account.bytes_sent

    def carried(self) -> dict[str, Any]:
        """Who takes part, and whether it failed."""
        return self._step.carried()

    def average(
        self,
        tensors: Sequence[Tensor],
        codec: Codec | None = None,
        error_feedback: Sequence[Tensor] | None = None,
    ) -> _Averages:
        """Mean over the participating groups, in place; one all-reduce for each tensor."""
        if codec is None:
            return _Averages(list(tensors), [self._average(tensor) for tensor in tensors])
        for tensor in tensors:
            codec.check(tensor.dtype)
        owed = [None] * len(tensors) if error_feedback is None else error_feedback
        reduce = partial(self._step.allreduce, should_quantize=codec, reports=False)
        works = [reduce(t, error_feedback=left) for t, left in zip(tensors, owed, strict=True)]
        return _Averages(list(tensors), works)

    def gather(self, tensors: Sequence[Tensor]) -> _Averages | _Gathered:
        """The participating groups' rows, `[1, …]` each → `[n, …]`, in participating order.

        All tensors, of whatever dtypes, travel as one.
        """
        if not tensors:
            return _Averages([], [])
        packed = torch.cat([as_bytes(tensor) for tensor in tensors])
        return _Gathered(
            tensors, *self._step.allgather(packed), judged=self._step.context.options.check_finite
        )

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
        """Discard the step, and free the groups that wait for this one in it; after a vote that
        committed it, heal it from the others."""
        if self._committed:
            self._steps.fall_behind(self._step)
        else:
            self._step.report_error(error)

    def close(self) -> bool:
        """The vote of this group's ranks."""
        self._committed = self._steps.close(self._step)
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


class BackgroundRound:
    """A round that forms in the background.

    Args:
        now: the round that it is when it has formed.
        step: the manager's step below it, one of `steps`.
        met: it has formed already, in the first quorum of this process.
    """

    bootstrap = False
    """Who is new meets the others at once, and not in the background."""

    def __init__(self, now: ManagerRound, steps: Steps, step: Step, *, met: bool = False) -> None:
        self._now, self._steps, self._step = now, steps, step
        self._met = met

    @property
    def final_sync(self) -> bool:
        """As in any round, when it has formed."""
        return self._now.final_sync

    @property
    def formed(self) -> bool:
        """Or it failed to form, which `meet` raises."""
        return self._step.formed

    def meet(self) -> bool:
        """Wait for the quorum, and load the state that this group was given, if it was behind."""
        if self._met:
            return False
        behind = self._step.plan.donor is not None
        self._met = True
        self._steps.heal(self._step)
        return behind

    @property
    def failed(self) -> bool:
        """Whether an error is known that will discard the round."""
        return self._now.failed

    @property
    def bytes_sent(self) -> int:
        """Payload that its collectives have sent so far."""
        return self._now.bytes_sent

    def carried(self) -> dict[str, Any]:
        """Who takes part, and whether it failed."""
        return self._now.carried()

    def average(
        self,
        tensors: Sequence[Tensor],
        codec: Codec | None = None,
        error_feedback: Sequence[Tensor] | None = None,
    ) -> Handle:
        """As in any round, when it has formed."""
        if codec is not None:
            for tensor in tensors:
                codec.check(tensor.dtype)
        return self._later(partial(self._now.average, tensors, codec, error_feedback), tensors)

    def gather(self, tensors: Sequence[Tensor]) -> Handle:
        """As in any round, when it has formed."""
        return self._later(partial(self._now.gather, tensors), tensors)

    def average_within(
        self, tensors: Sequence[Tensor], islands: Callable[[int], list[list[int]]]
    ) -> Handle:
        """As in any round: refused at once."""
        return self._now.average_within(tensors, islands)

    def fail(self, error: Exception) -> None:
        """Discard the step, and free the groups that wait for this one in it."""
        self._now.fail(error)

    def close(self) -> bool:
        """The vote of this group's ranks."""
        return self._now.close()

    def _later(self, start: Callable[[], Handle], tensors: Sequence[Tensor]) -> Handle:
        is_made_anew = self._met
        beside = SideStream(tensors)

        def begin() -> Handle | None:
            step = self._step
            if not is_made_anew and (step.failure or step.plan.donor):
                return None  # `meet` raises; or this group heals, and what it sends is made anew
            with beside:
                handle = start()
                handle.advance()
            return handle

        return _Later(self._steps.in_background(begin), tensors, beside, self._step)


class _Later(Handle):
    """What begins in the background."""

    def __init__(
        self,
        begun: Future[Handle | None],
        tensors: Sequence[Tensor],
        beside: SideStream,
        step: Step,
    ) -> None:
        self._begun, self._tensors, self._beside, self._step = begun, tensors, beside, step

    def wait(self) -> list[Tensor]:
        with self._step.ledger.spending(Bucket.COMMUNICATE):
            handle = self._handle()
        self._beside.join()
        return list(self._tensors) if handle is None else handle.wait()

    def is_finite(self) -> bool:
        handle = self._handle()
        return handle is None or handle.is_finite()

    def _handle(self) -> Handle | None:
        self._step.context.training.wait(self._step.ready)
        return self._begun.result()
