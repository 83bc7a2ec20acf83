"""Moving live state between groups: what a donor offers, what a healing group takes.

The payload is `{"user": {key: state}, "torchft": {"step": …, "batches_committed": …}}`, read under
the lock that keeps optimizers out. A donor offers it until it votes; whoever has not fetched it by
then heals in a later step. A fetched state is only staged here: the manager loads it on the main
thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torchft.checkpointing import CheckpointTransport
from torchft.coordination import ManagerClient
from torchft.errors import HealError
from torchft.manager.plan import Donor, Plan

__all__ = ["fetch", "offer"]

_log = logging.getLogger("torchft.manager.heal")


def offer(
    transport: CheckpointTransport[Any],
    plan: Plan,
    collect_state: Callable[[], Any],
    timeout: timedelta,
) -> None:
    """Let the members in `plan.serves` fetch the state, or tell them why there is none.

    A failure is theirs to notice and ours to log: it does not touch this group's step.
    """
    try:
        state = collect_state()
        transport.check_state(state)
    except Exception as error:
        _say_failed(plan, error)
        with suppress(HealError, TimeoutError):  # they are gone: nobody is left to be told
            reason = f"{type(error).__name__}: {error}"
            transport.refuse_checkpoint(list(plan.serves), plan.step, reason, timeout)
        return
    try:
        transport.send_checkpoint(
            dst_ranks=list(plan.serves), step=plan.step, state_dict=state, timeout=timeout
        )
    except Exception as error:
        _say_failed(plan, error)


def _say_failed(plan: Plan, error: Exception) -> None:
    names = ", ".join(plan.members[rank] for rank in plan.serves)
    said = "[%s - step %d] %s: %s: this state cannot be offered to %s"
    _log.error(said, plan.name, plan.step, type(error).__name__, error, names)
    _log.debug("the same, with where it came from", exc_info=error)


def fetch(
    transport: CheckpointTransport[Any],
    plan: Plan,
    donor: Donor,
    *,
    group_rank: int,
    connect_timeout: timedelta,
    timeout: timedelta,
) -> Any:
    """The state of `donor` at `plan.step`. Raises HealError when it cannot be had."""
    name = plan.members[donor.replica_rank]
    try:
        client = ManagerClient(donor.manager_address, connect_timeout=connect_timeout)
        metadata = client._checkpoint_metadata(group_rank, timeout=timeout)
        return transport.recv_checkpoint(
            src_rank=donor.replica_rank, metadata=metadata, step=plan.step, timeout=timeout
        )
    except Exception as error:
        then = "the next quorum asks another one" if plan.donors > 1 else "it is asked again"
        raise HealError(f"{error}; the donor was {name}: {then}") from error
