"""A round that forms in the background, while training goes on.

Nobody waits for its quorum, for whoever joins in it to heal, or for what is open to arrive before
that, until an average is due. What it sends begins in the background too, when it has formed: at
all members in one order, both halves of it, before the next one forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from torchft.ledger import Bucket, Ledger
from torchft.manager.side_stream import SideStream
from torchft.peers import Handle

if TYPE_CHECKING:
    from torchft.manager.open_step import OpenStep
    from torchft.manager.peers import ManagedRound
    from torchft.quantization import Codec

__all__ = ["BackgroundRound"]


class _Background(Protocol):
    """Calls run one after the other, the first one when the quorum has formed."""

    def __call__(self, call: Callable[[], Handle | None]) -> Future[Handle | None]: ...


class BackgroundRound:
    """`now` is the round that it is when it has formed, `step` the manager's step below it. `met`:
    it has formed already, in the first quorum of this process."""

    opening = False
    """Who is new meets the others at once."""

    def __init__(
        self, now: ManagedRound, step: OpenStep, background: _Background, *, met: bool = False
    ) -> None:
        self._now, self._step, self._background = now, step, background
        self._met = met

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
        self._step.heal()
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
        unsaid: Sequence[Tensor] | None = None,
    ) -> Handle:
        """As in any round, when it has formed."""
        if codec is not None:
            for tensor in tensors:
                codec.check(tensor.dtype)
        return self._later(partial(self._now.average, tensors, codec, unsaid), tensors)

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
            if not is_made_anew and (step.transaction.failure or step.plan.donor):
                return None  # `meet` raises; or this group heals, and what it sends is made anew
            with beside:
                handle = start()
                handle.advance()
            return handle

        return _Later(self._background(begin), tensors, beside, self._step.transaction.ledger)


class _Later(Handle):
    """What begins in the background."""

    def __init__(
        self,
        begun: Future[Handle | None],
        tensors: Sequence[Tensor],
        beside: SideStream,
        ledger: Ledger,
    ) -> None:
        self._begun, self._tensors, self._beside, self._ledger = begun, tensors, beside, ledger

    def wait(self) -> list[Tensor]:
        with self._ledger.spending(Bucket.COMMUNICATE):
            handle = self._begun.result()
        self._beside.join()
        return list(self._tensors) if handle is None else handle.wait()

    def is_finite(self) -> bool:
        handle = self._begun.result()
        return handle is None or handle.is_finite()
