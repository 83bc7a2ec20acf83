"""The ranks of one replica group while they write or read one checkpoint together.

    found = ranks.together(lambda: part_of(ranks.rank))     # on all ranks: what each one found
    ranks.first(lambda: folder.mkdir())                     # on rank 0, and the others wait

What fails on one rank raises on all of them, so that nobody waits for who has given up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from torchft.errors import CheckpointError, SettingsError

__all__ = ["Ranks"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This rank among those of its group."""

    rank: int = 0
    count: int = 1
    pg: Any = None
    """A process group of its own over all of them; None where there is one rank."""

    @classmethod
    def of_group(cls, rank: int, count: int, timeout: timedelta) -> Ranks:
        """Meet the other ranks; all call it. `timeout` is for whatever they do together.

        Raises:
            SettingsError: there are several, and torch.distributed does not connect just them.
        """
        if count == 1:
            return cls()
        connected = dist.get_world_size() if dist.is_initialized() else 0
        if connected != count or dist.get_rank() != rank:
            raise SettingsError(
                f"this is rank {rank} of a group of {count}, and torch.distributed connects "
                f"{connected} ranks: call init_process_group in each group, over its ranks, before"
            )
        return cls(rank, count, dist.new_group(backend="gloo", timeout=timeout))

    def together(self, call: Callable[[], T]) -> list[T]:
        """What `call` returns on each rank, in order.

        Raises:
            CheckpointError: it raised on another rank. Its own error is raised here.
        """
        mine, error = _tried(call)
        said = None if error is None else f"{type(error).__name__}: {error}"
        found: list[Any] = [(mine, said)] * self.count
        if self.pg is not None:
            dist.all_gather_object(found, (mine, said), group=self.pg)
        if error is not None:
            raise error
        for rank, (_, why) in enumerate(found):
            if why is not None:
                raise CheckpointError(f"{why} (on rank {rank})")
        return [one for one, _ in found]

    def each(self, call: Callable[[], T]) -> T:
        """What `call` returns here, when it has returned on all ranks; raises as `together`."""
        kept: list[T] = []
        self.together(lambda: kept.append(call()))
        return kept[0]

    def first(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, where alone it is called; raises as `together`."""
        return self.together(lambda: call() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def share(self, names: list[str]) -> list[str]:
        """Those of `names` that are this rank's part of some work."""
        return names[self.rank :: self.count]


def _tried(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error
