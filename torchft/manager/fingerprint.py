"""What must be equal in all groups before any number is mixed, and how they compare it.

Each member of a new process group writes a digest of its model (names, shapes, dtypes) and of the
settings that change the arithmetic into the rendezvous store, and reads everybody's. One that
differs from the reference stops with an error that names the difference; the others discard the
step and go on without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import torch
from torch.distributed import Store

from torchft.errors import CollectiveError, MismatchError
from torchft.manager.plan import Options
from torchft.sharded import Sharding, is_dtensor

__all__ = [
    "Description",
    "Fingerprint",
    "compare",
    "describe",
    "exchange",
    "publish",
    "same_world_sizes",
    "withdraw",
]

_LONGEST = 200
"""Characters of one value in an error: a description may be as long as the model."""

Description = dict[str, object]
"""What is compared, in the order in which differences are named. Values that JSON can hold."""


class Fingerprint:
    """What one manager has compared with the other groups, whenever a process group is made.

    Args:
        options: how the manager runs its steps, as far as all groups must agree on it.
    """

    def __init__(self, options: Options) -> None:
        self._options: Description = {
            "use_async_quorum": not options.sync,
            "world_size_mode": options.mode.name,
            "min_replica_size": options.min_replica_size,
            "check_finite": options.check_finite,
        }
        self._described: Description = {}
        self._listeners: Description = {}
        self._once: Description = {}

    def describe_model(self, key: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Have names, shapes and dtypes of `tensors` compared, before anything is averaged."""
        self._described[key] = describe(tensors)

    def describe_setting(self, name: str, value: str) -> None:
        """Have a setting compared before anything is averaged, e.g. the codec."""
        self._described[name] = value

    def update(self, always: Description, once: Description) -> bool:
        """Have compared what the step listeners describe: `always`, and `once` in the next step.

        Returns:
            Whether there is something new to compare, for which a process group must be made.
        """
        new = bool(once) or always != self._listeners
        self._listeners, self._once = always, self._once | once
        return new

    def whole(self) -> Description:
        """All that must be equal in the groups now."""
        return {**self._options, **self._described, **self._listeners, **self._once}

    def was_compared(self) -> None:
        """Forget what was to be compared once: all groups have agreed on it."""
        self._once = {}


def describe(tensors: Iterable[tuple[str, torch.Tensor]]) -> Description:
    """Name → shape, and how it is sharded, and dtype of each tensor, e.g.
    `{"weight": "[3, 4] float32", "bias": "[3] as shard(0) over fsdp=2 float32"}`."""
    return {
        name: f"{_cut(tensor)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors
    }


def _cut(tensor: torch.Tensor) -> object:
    return Sharding.of(tensor) if is_dtensor(tensor) else list(tensor.shape)


def compare(mine: Mapping[str, object], theirs: Mapping[str, object]) -> str | None:
    """Describe the first difference in words; None if the two are equal."""
    for name in [*theirs, *mine]:
        here, there = mine.get(name), theirs.get(name)
        if here == there:
            continue
        if isinstance(here, dict) and isinstance(there, dict):
            return f"{name}: {compare(here, there)}"
        return f"{name} is {_said(here)} here and {_said(there)} there"
    return None


def _said(value: object) -> str:
    if value is None:
        return "absent"
    if isinstance(value, Mapping):
        return f"there with {len(value)} entries" + (
            f", such as {next(iter(value))}" if value else ""
        )
    said = str(value)
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"


def same_world_sizes(
    sizes: Sequence[int], members: Sequence[str], rank: int, reference: int
) -> None:
    """Compare the ranks in each group, by replica rank, before any of them meets another.

    Raises:
        MismatchError: this group differs from the reference. It cannot take part.
        CollectiveError: another one differs. This step is lost, the next one may be without it.
    """
    right = sizes[reference]
    if sizes[rank] != right:
        raise MismatchError(
            f"{members[rank]} has {sizes[rank]} ranks and {members[reference]} has {right}: start "
            "every group with the same --nproc_per_node and --nnodes"
        )
    odd = [f"{name} has {size}" for name, size in zip(members, sizes, strict=True) if size != right]
    if odd:
        raise CollectiveError(
            f"{', '.join(odd)} ranks, the other groups have {right}: nothing is averaged with it"
        )


def exchange(
    store: Store,
    mine: Description,
    *,
    rank: int,
    members: Sequence[str],
    reference: int,
    timeout: timedelta,
) -> None:
    """Compare with every member, through the store of the quorum's primary.

    Raises:
        MismatchError: this group differs from the reference. It cannot take part.
        CollectiveError: another one differs. This step is lost, the next one may be without it.
        TimeoutError: a member did not describe itself within `timeout`.
    """
    store.set(f"fingerprint/{rank}", publish(store, "description", rank, mine))
    keys = [f"fingerprint/{other}" for other in range(len(members))]
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [members[other] for other, key in enumerate(keys) if not store.check([key])]
        if not missing:
            raise
        raise TimeoutError(
            f"{', '.join(missing)} did not say within {timeout.total_seconds():g} s what is "
            "trained there: a process is gone or stuck"
        ) from error
    prints = store.multi_get(keys)
    right = prints[reference]
    if prints[rank] != right:
        difference = compare(mine, json.loads(store.get(f"description/{reference}")))
        raise MismatchError(
            f"{members[rank]} differs from {members[reference]}: {difference}. Start every group "
            "with the same script, model and settings"
        )
    odd = [other for other, seen in enumerate(prints) if seen != right]
    if odd:
        there = json.loads(store.get(f"description/{odd[0]}"))
        raise CollectiveError(
            f"{', '.join(members[other] for other in odd)} runs another model or other settings "
            f"than {members[reference]}: nothing is averaged with it. In {members[odd[0]]}, "
            f"{compare(mine, there)}"
        )


def publish(store: Store, kind: str, rank: int, mine: Description) -> str:
    """Write what a member says of itself under `kind/rank`; its SHA-256 in hexadecimal digits."""
    text = json.dumps(mine, sort_keys=True)
    store.set(f"{kind}/{rank}", text)
    return hashlib.sha256(text.encode()).hexdigest()


def withdraw(store: Store, rank: int, also: Iterable[str] = ()) -> None:
    """Delete what `exchange` wrote, and what was published `also`, by kind, once all members have
    read it."""
    for kind in ("description", "fingerprint", *also):
        store.delete_key(f"{kind}/{rank}")
