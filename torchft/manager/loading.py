"""The last part of a heal, on the training thread: a donor's state, which was fetched, is loaded.

A heal is a commit of the donor's step and stands whatever the vote says. What cannot be loaded now
cannot be loaded at the next try either, and every try costs the other groups a step: so the whole
group ends, with the error that it met, after the first one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torchft.errors import StateDictError
from torchft.ledger import Bucket, Ledger
from torchft.manager.live_state import LiveState
from torchft.manager.progress import Progress
from torchft.manager.telemetry import StepLog
from torchft.manager.transaction import Transaction

__all__ = ["Loader"]


class Loader:
    """Loads what a step was given to heal from.

    Args:
        load_progress: goes on from the donor's step.
        healing: entered while the state of a step is loaded: open steps are taken over in it.
        leave: ends this rank's part in the job, because of an error.
    """

    def __init__(
        self,
        *,
        state: LiveState,
        progress: Progress,
        load_progress: Callable[[dict[str, int]], None],
        healing: Callable[[Transaction], AbstractContextManager[None]],
        leave: Callable[[Transaction, Exception], None],
        ledger: Ledger,
        log: StepLog,
    ) -> None:
        self._state = state
        self._progress = progress
        self._load_progress = load_progress
        self._healing = healing
        self._leave = leave
        self._ledger = ledger
        self._log = log

    def load(self, transaction: Transaction) -> None:
        """Load the state that was fetched for this step, if any.

        Raises:
            StateDictError: it cannot be loaded here. This rank has left the job by then.
        """
        staged, transaction.staged = transaction.staged, None
        plan = transaction.plan
        if staged is None or plan is None or plan.donor is None:
            return
        before, donor = self._progress.step, plan.members[plan.donor.replica_rank]
        with self._ledger.spending(Bucket.HEAL):
            self._load(transaction, staged, f"step {plan.step} of {donor}", plan.name)
        # With a delay others begin before the one in which it healed is closed. Should another rank
        # of this group have failed to heal, it stays fresh, and so does the group.
        self._progress.fresh = False
        now = self._progress.step
        self._log.say(logging.INFO, before, "healed from %s, now at step %d", donor, now)

    def _load(
        self, transaction: Transaction, staged: dict[str, Any], source: str, name: str
    ) -> None:
        try:
            with self._healing(transaction):
                self._state.load(staged["user"], f"{source}, at {name}")
        except StateDictError as error:
            self._leave(transaction, error)
            raise
        self._load_progress(staged["torchft"])
