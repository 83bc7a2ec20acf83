"""One step while it runs: its plan, its error, the averages in flight, and how far it has formed.

Everything that belongs to a step hangs on its transaction, so nothing outlives it: an average that
fails late reports to the step that started it, never to the one that runs by then.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchft.errors import NotFiniteError
from torchft.ledger import Bucket, Ledger
from torchft.manager.plan import Plan
from torchft.process_group.account import Account
from torchft.process_group.generation import Generation

if TYPE_CHECKING:
    from torchft.manager.average import Average

__all__ = ["ExceptionWithTraceback", "Transaction"]


def _forget_frames(error: BaseException | None) -> None:
    """The stack is kept as text; the frames themselves hold tensors and process groups."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class ExceptionWithTraceback(Exception):
    """An error with the stack that it came from, kept for whoever asks `Manager.errored()`."""

    def __init__(self, e: Exception) -> None:
        super().__init__(e)
        self.original_exception = e
        self.stack_trace = "".join(traceback.format_exception(e))


class Transaction:
    """A step between `start_quorum` and the vote."""

    def __init__(self, ledger: Ledger, on_error: Callable[[Transaction], None]) -> None:
        self.ledger = ledger
        self.plan: Plan | None = None
        self.error: ExceptionWithTraceback | None = None
        self._told = False
        self.broken = False
        """An error that the collectives of this step do not survive."""
        self.failure: BaseException | None = None
        """No quorum came about: raised to the caller, since there is no step to discard."""
        self.staged: Any = None
        """A donor's state, fetched and not loaded yet."""
        self.apart = False
        """It has no part in the collectives, which are over: nobody waits for it there."""
        self.averages: list[Average] = []
        """What was begun in this step. The vote waits for all of it."""
        self.generation: Generation | None = None
        """Among whom it communicates, where its process group has generations."""
        self.group_error: Callable[[], Exception | None] = lambda: None
        """Why its process group is of no use any more."""
        self.account = Account()
        """What its collectives sent; they move as much in as out."""
        self.ledger_before = ledger.snapshot()
        self.offered_before = 0
        """Bytes of state sent when the step could begin to communicate."""
        self.healed_bytes = 0
        """Bytes of state received in it."""
        self._on_error = on_error
        # In the order in which they are reached. The last one is set whatever happens.
        self.decided = threading.Event()
        self.configured = threading.Event()
        self.ready = threading.Event()

    def finish_forming(self) -> None:
        """Free whoever waits: the quorum is there, or `failure` says why not."""
        self.decided.set()
        self.configured.set()
        self.ready.set()

    def wait_formed(self) -> Plan:
        """Wait until this group can communicate, booking the wait where it was spent.

        Raises whatever kept the quorum from forming.
        """
        if not self.ready.is_set():
            for bucket, reached in (
                (Bucket.QUORUM, self.decided),
                (Bucket.CONFIGURE, self.configured),
                (Bucket.HEAL, self.ready),
            ):
                if not reached.is_set():
                    with self.ledger.spending(bucket):
                        reached.wait()
        if self.failure is not None:
            raise self.failure
        assert self.plan is not None
        return self.plan

    def report(self, error: Exception, *, at_home: bool = False) -> None:
        """The step failed. `at_home`: the others can commit it without this group, which goes on
        to take part in their collectives."""
        # The first one is the cause; those that come of giving up the rest add nothing. Only what
        # breaks the step says more than that an average is not finite.
        if self.error is None or (self.not_finite and not isinstance(error, NotFiniteError)):
            self.error, self._told = ExceptionWithTraceback(error), False
        self.broken = self.broken or not (at_home or self.apart)
        self._on_error(self)

    def untold(self) -> Exception | None:
        """Its error, the first time that it is asked for: an event is logged once."""
        if self.error is None or self._told:
            return None
        self._told = True
        return self.error.original_exception

    def release(self) -> None:
        """Nothing more will be done in it: let go of what would keep it, and the process group of
        its step, alive until the garbage collector comes."""
        self.averages = []
        if self.error is not None:
            _forget_frames(self.error.original_exception)

    @property
    def failed(self) -> bool:
        """Whether an error was reported, which discards the step."""
        return self.error is not None

    @property
    def not_finite(self) -> bool:
        """Whether all that is wrong with it is NaN or infinity in an average: then communication
        works, and every member discards it."""
        error = self.error
        return error is not None and isinstance(error.original_exception, NotFiniteError)
