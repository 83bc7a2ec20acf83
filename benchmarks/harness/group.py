"""A replica group of one rank inside a worker, and what it needs: a store and the manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchft import Manager

__all__ = ["manager_of"]


@contextmanager
def manager_of(
    group: int,
    *,
    lighthouse: str,
    min_replicas: int,
    timeout_s: float = 30,
    address: str = "127.0.0.1",
    state_dict: Callable[[], Any] = dict,
    load_state_dict: Callable[[Any], None] = lambda _: None,
    **options: Any,
) -> Iterator[Manager]:
    """The manager of `group_{group}`, shut down when the block ends. Others reach it at
    `address`; `options` are the manager's.

    torch is imported here, so that a worker can time its own imports.
    """
    from torch.distributed import TCPStore

    from torchft import Manager, ProcessGroupGloo

    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=timeout_s)),
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        min_replica_size=min_replicas,
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"group_{group}",
        hostname=address,
        timeout=timedelta(seconds=timeout_s),
        **options,
    )
    try:
        yield manager
    finally:
        manager.shutdown(wait=False)
