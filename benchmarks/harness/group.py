"""A replica group of one rank inside a worker, and what it needs: a store and the manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from harness.workers import Worker, results

if TYPE_CHECKING:
    from torchft import Manager

__all__ = ["both_groups", "manager_of", "meet"]


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


def both_groups(function: Callable[..., Any], *, timeout_s: float, **arguments: Any) -> Any:
    """Run `function(line, group, port, **arguments)` in two processes, which `meet`; returns what
    the first one returned."""
    with ExitStack() as stack:
        first = stack.enter_context(Worker(function, group=0, port=None, **arguments))
        port = first.event(timeout_s)
        second = stack.enter_context(Worker(function, group=1, port=port, **arguments))
        return results([first, second], timeout_s=timeout_s)[0]


def meet(line: Connection, group: int, port: int | None) -> Callable[[], object]:
    """Join torch's own gloo group of both, which meet at the first one's store. Returns a barrier,
    which has a group of its own."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port or 0, is_master=port is None, wait_for_workers=False)
    if port is None:
        line.send(store.port)
    dist.init_process_group("gloo", store=store, rank=group, world_size=2)
    return partial(dist.barrier, dist.new_group(backend="gloo"))
