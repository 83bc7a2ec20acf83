"""Two members of a process group in this process, configured again whenever a test wants it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch.distributed import TCPStore

from torchft.process_group import ProcessGroup

__all__ = ["Pair"]

Kind = TypeVar("Kind", bound=ProcessGroup)

DEADLINE_S = 90.0


class Pair(Generic[Kind]):
    """Two members of one kind, made by `make`, which join each other from two threads."""

    def __init__(self, make: Callable[[], Kind]) -> None:
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.members: Sequence[Kind] = [make(), make()]
        self.times = 0

    def configure(self) -> Sequence[Kind]:
        """Both, among each other, under a name that was not used before."""
        self.times += 1
        errors: list[Exception] = []

        def join(rank: int) -> None:
            try:
                place = f"localhost:{self.store.port}/{self.times}"
                self.members[rank].configure(place, f"replica_{rank}", rank, 2)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert not errors and not any(thread.is_alive() for thread in threads), errors
        return self.members

    def shutdown(self) -> None:
        """Free what both have."""
        for member in self.members:
            member.shutdown()
