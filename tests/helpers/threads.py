"""Replica groups as threads of the test's process, over a real lighthouse and real managers.

    results = groups(2, story)            # story(group) in a thread for each, in order
    results = groups(2, story, ranks=2)   # in one for each rank: group 0's, then group 1's

They are cheap where nobody has to be killed. A group waits for the others of its step, never for
time to pass, and deadlines only end a broken test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from torchft.coordination import LighthouseServer
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

__all__ = ["Group", "groups"]

DEADLINE_S = 60.0
HERE = "127.0.0.1"


@dataclass
class Group:
    """One rank of a group."""

    number: int
    count: int
    lighthouse: str
    store: TCPStore
    """That of its group."""
    rank: int = 0
    ranks: int = 1
    undo: ExitStack = field(default_factory=ExitStack)

    def manager(self, **options: Any) -> Manager:
        """Its manager, shut down when its story ends; all groups are waited for."""
        defaults: dict[str, Any] = {
            "pg": ProcessGroupGloo(timeout=timedelta(seconds=30)),
            "load_state_dict": lambda _: None,
            "state_dict": dict,
            "min_replica_size": self.count,
            "timeout": timedelta(seconds=30),
            "quorum_timeout": timedelta(seconds=30),
            "rank": self.rank,
            "world_size": self.ranks,
            "store_addr": HERE,
            "store_port": self.store.port,
            "lighthouse_addr": self.lighthouse,
            "replica_id": f"group_{self.number}",
            "hostname": HERE,
        }
        manager = Manager(**{**defaults, **options})
        self.undo.callback(manager.shutdown)
        return manager


def groups(count: int, story: Callable[[Group], Any], *, ranks: int = 1) -> list[Any]:
    """What `story` returned for each rank of `count` groups. The first error is raised."""
    stores = [TCPStore(HERE, 0, is_master=True, wait_for_workers=False) for _ in range(count)]
    lighthouse = LighthouseServer(bind=f"{HERE}:0", min_replicas=count, join_timeout_ms=10_000)
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def live(at: int) -> None:
        number, rank = divmod(at, ranks)
        group = Group(number, count, lighthouse.address(), stores[number], rank, ranks)
        try:
            with group.undo:
                results[at] = story(group)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=live, args=(n,), daemon=True) for n in range(count * ranks)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "a group is stuck"
    finally:
        lighthouse.shutdown()
    return [results[at] for at in range(count * ranks)]
