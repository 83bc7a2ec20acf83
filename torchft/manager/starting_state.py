"""Whether groups that start from checkpoints of the same step start from the same state.

A group that is behind heals, and so do new ones at step 0 when they ask for it. New groups at the
same step do not: each is as far as the others, and would train on from weights of its own. So in
its first quorum a process writes digests of its state into the rendezvous store, before it
describes its model there (`fingerprint.py`), and reads those of the others that do not heal. After
that nothing is read or sent, until a new group comes that is as far as this one.

What is compared must be equal by contract: parameters, state and options of an optimizer whose
gradients are averaged; between rounds of a strategy only what its recipes share. Buffers, random
numbers and positions in the data are not compared. Of sharded tensors this rank's part is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import Store
from torch.utils._pytree import keystr, tree_flatten_with_path

from torchft.digest import digest
from torchft.errors import CollectiveError, MismatchError
from torchft.manager.fingerprint import Description, compare, publish
from torchft.manager.live_state import LiveState
from torchft.manager.plan import Plan
from torchft.manager.registered import Registered
from torchft.manager.weak_registry import WeakRegistry

__all__ = [
    "PUBLISHED",
    "EqualState",
    "StartingState",
    "announce",
    "check",
    "differs",
    "digests",
    "must_compare",
]

PUBLISHED = ("state", "start")
"""What `announce` writes into the store for each member."""

_DIGITS = 16
"""Of each digest. Accidents are to be found, not forgeries."""

_READING = timedelta(seconds=5)
"""How long a member waits before it ends, so that the others can read from its store why."""


class EqualState(Protocol):
    """What holds state that is equal in all groups which are at the same step."""

    kind: str
    """What it is, in the words that a difference between groups is told with."""

    def equal_state(self) -> Mapping[str, Any]:
        """The state by name: nested dicts, lists and tuples of tensors and numbers."""
        ...


class StartingState:
    """The state that one process starts from, as far as it must be equal in all groups.

    Args:
        state: says when the state may be read.
        registered: is compared where nothing else was added.
    """

    def __init__(self, state: LiveState, registered: Registered) -> None:
        self._state, self._registered = state, registered
        self._sources = WeakRegistry[EqualState]()
        self.starts = True
        """Whether this process has not met another group since it started."""

    def add(self, source: EqualState) -> None:
        """Have the state of `source` compared, as long as somebody else holds it."""
        self._sources.add(source)

    def described(self, plan: Plan) -> Description | None:
        """The digest of each tensor and number by name, read now; None where this group need not
        compare its state in this quorum."""
        return self._describe() if must_compare(plan, starts=self.starts) else None

    def compared(self, plan: Plan) -> None:
        """The members of this quorum have met, with equal state or by a heal."""
        self.starts = self.starts and len(plan.members) == 1

    def _describe(self) -> Description:
        sources = self._sources.named() or [("registered", self._registered)]
        with self._state.reading(), torch.no_grad():
            return {
                f"{key}: {name}": value
                for key, source in sources
                for name, value in digests(source.equal_state()).items()
            }


def must_compare(plan: Plan, *, starts: bool) -> bool:
    """Whether this group must compare its state with others in this quorum: it `starts`, or one of
    the others does, and neither of them heals."""
    level = plan.level
    if plan.replica_rank not in level or len(level) < 2:
        return False
    return starts or not plan.fresh.isdisjoint(level)


def digests(state: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each tensor and float in a nested state, by its place. Others, such as
    counters and names, are left out, and so are tensors without plain bytes."""
    found = {}
    for name, value in state.items():
        for path, leaf in tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor | float):
                try:
                    found[f"{name}{keystr(path)}"] = digest(leaf)[:_DIGITS]
                except TypeError:
                    continue
    return found


def announce(store: Store, mine: Description, *, rank: int, starts: bool) -> None:
    """Tell the others this member's state, before it publishes its description: whoever has waited
    for that sees who announced anything."""
    said = {"digest": publish(store, "state", rank, mine), "starts": starts}
    store.set(f"start/{rank}", json.dumps(said))


def check(store: Store, mine: Description, plan: Plan) -> None:
    """Compare with the members that announced their state in this quorum.

    Raises:
        MismatchError: this group starts from other state than another one.
        CollectiveError: another group starts from other state than this one, which has trained
            already. This step is lost, the next one may be without it.
    """
    me = plan.replica_rank
    ranks = [rank for rank in plan.level if rank == me or store.check([f"start/{rank}"])]
    texts = store.multi_get([f"start/{rank}" for rank in ranks])
    other = differs(me, {rank: json.loads(text) for rank, text in zip(ranks, texts, strict=True)})
    if other is None:
        return
    odd, wrong = other
    theirs = json.loads(store.get(f"state/{odd}"))
    store.set(f"read/{me}", "")
    with suppress(RuntimeError):  # who has ended meanwhile reads nothing more
        store.wait([f"read/{rank}" for rank in ranks], _READING)
    here, there, at = plan.name, plan.members[odd], f"at step {plan.step}"
    if not wrong:
        raise CollectiveError(
            f"{there} starts {at} from other state than {here} has: nothing is averaged with it. "
            f"In {there}, {compare(theirs, mine)}"
        )
    raise MismatchError(
        f"{here} starts {at} from other state than {there}: {compare(mine, theirs)}. Start all "
        "groups from one checkpoint, or let them heal: one from it, the others from none"
    )


def differs(me: int, said: Mapping[int, Mapping[str, Any]]) -> tuple[int, bool] | None:
    """Who has other state than `me`, and whether `me` is wrong. None: all have the same.

    Whoever has trained is right. Where all start, nobody knows who is, and all are wrong.

    Args:
        said: by replica rank: `digest`, and whether it `starts`.
    """
    others = [rank for rank in said if said[rank]["digest"] != said[me]["digest"]]
    if not others:
        return None
    trained = [rank for rank in said if not said[rank]["starts"]]
    if trained and trained[0] not in others:
        return others[0], False
    return (trained or others)[0], True
