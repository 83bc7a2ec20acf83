"""A group that stays while others come and go holds on to nothing of them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import pytest
import torch
from helpers.coordination import lighthouse
from helpers.waiting import until
from torch.distributed import TCPStore

from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

TEN = timedelta(seconds=10)


@pytest.fixture
def without_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@contextmanager
def group(name: str, address: str, *, asynchronous: bool) -> Iterator[Manager]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TEN),
        load_state_dict=lambda _: None,
        state_dict=lambda: {"w": torch.zeros(3)},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        use_async_quorum=asynchronous,
        replica_id=name,
        lighthouse_addr=address,
        hostname="127.0.0.1",
        timeout=TEN,
    )
    try:
        yield manager
    finally:
        manager.shutdown()


def step(manager: Manager, *, fails: bool = False) -> None:
    manager.start_quorum()
    manager.allreduce(torch.ones(3)).wait()
    manager.allreduce(torch.ones(5))
    if fails:
        manager.report_error(RuntimeError("on purpose"))
    manager.should_commit()


def threads() -> int:
    """All of this process, also those that Python does not know."""
    return psutil.Process().num_threads()


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.usefixtures("without_garbage_collector")
def test_the_process_groups_of_those_who_left_are_freed_at_once(asynchronous: bool) -> None:
    """Old process groups were freed by the garbage collector alone, where that ran at all."""
    generations: list[weakref.ref] = []
    over = threading.Event()
    with (
        lighthouse(heartbeat_timeout_ms=700) as server,
        group("a", server.address(), asynchronous=asynchronous) as stays,
    ):

        def train() -> None:
            while not over.is_set():
                step(stays)
                now = stays._pg.generation  # type: ignore[attr-defined]
                if not generations or generations[-1]() is not now:
                    generations.append(weakref.ref(now))
                del now

        thread = threading.Thread(target=train)
        thread.start()
        until(lambda: len(generations) == 1, "it begins alone")
        before_all = threads()
        for fails in (False, True, False):
            before = len(generations)
            with group("b", server.address(), asynchronous=asynchronous) as comes:
                while comes.num_participants() < 2:
                    step(comes)
                step(comes, fails=fails)
            until(lambda before=before: len(generations) > before + 1, "it goes on alone")
        over.set()
        thread.join(20)
        assert not thread.is_alive()
        assert len(generations) >= 6
        until(lambda: sum(g() is not None for g in generations) <= 1, "all but the last are freed")
        until(lambda: threads() <= before_all + 4, "their threads end")
