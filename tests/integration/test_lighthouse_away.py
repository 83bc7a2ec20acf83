"""A lighthouse that goes away, comes back, or stands still: the job goes on as it was."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from helpers.coordination import Child, ask, at_once, free_port, lighthouse, seconds
from helpers.coordination import group as server
from helpers.waiting import until
from torch.distributed import TCPStore

from torchft.coordination import LighthouseServer, ManagerClient
from torchft.errors import UnreachableError
from torchft.manager import Manager
from torchft.process_group import ProcessGroupDummy


@contextmanager
def group(store: TCPStore, address: str, *, ranks: int = 1, **options: Any) -> Iterator[list]:
    """The managers of all ranks of one group, which has nobody to average with."""

    def make(rank: int) -> Manager:
        return Manager(
            ProcessGroupDummy(0, 1),
            None,
            None,
            1,
            rank=rank,
            world_size=ranks,
            store_addr="127.0.0.1",
            store_port=store.port,
            lighthouse_addr=address,
            hostname="127.0.0.1",
            **{
                "replica_id": "group_0",
                "timeout": seconds(20),
                "quorum_timeout": seconds(0.4),
                "use_async_quorum": False,
                **options,
            },
        )

    with ExitStack() as stack:
        managers = at_once(*(lambda rank=rank: make(rank) for rank in range(ranks)))
        for manager in managers:
            assert isinstance(manager, Manager), manager
            stack.callback(manager.shutdown)
        yield managers


def step(manager: Manager) -> bool:
    manager.start_quorum()
    manager.allreduce(torch.ones(1)).wait()
    return manager.should_commit()


def returns_at(port: int, when: threading.Event) -> LighthouseServer:
    assert when.wait(30)
    return LighthouseServer(f"127.0.0.1:{port}", 1, heartbeat_timeout_ms=300)


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("ranks", [1, 2], ids=["one rank", "two ranks"])
def test_a_lighthouse_that_is_away_for_several_quorum_timeouts_costs_nothing(
    store: TCPStore, caplog: pytest.LogCaptureFixture, asynchronous: bool, ranks: int
) -> None:
    port = free_port()
    caplog.set_level(logging.WARNING, "torchft.manager")
    said = threading.Event()
    first = lighthouse(bind=f"127.0.0.1:{port}")
    server = first.__enter__()
    with group(store, server.address(), ranks=ranks, use_async_quorum=asynchronous) as managers:
        steps = [lambda manager=manager: step(manager) for manager in managers]
        assert at_once(*steps) == [True] * ranks
        server.shutdown()

        def back() -> LighthouseServer:
            until(lambda: "waiting for it" in caplog.text, "a group says that it waits")
            time.sleep(0.5)  # more than another quorum timeout
            said.set()
            return returns_at(port, said)

        *done, later = at_once(*steps, back)
        assert done == [True] * ranks
        assert [manager.current_step() for manager in managers] == [2] * ranks
        later.shutdown()
    waits = [line for line in caplog.messages if "no quorum from the lighthouse" in line]
    assert len(waits) == 1, "said once in a while, by one rank"
    assert "TORCHFT_LIGHTHOUSE_TIMEOUT_SEC" in waits[0] and "step 1" in waits[0]


def test_it_is_waited_for_as_long_as_was_told_and_no_longer(store: TCPStore) -> None:
    with lighthouse() as server:
        address = server.address()
        with group(store, address, lighthouse_timeout=seconds(1)) as (manager,):
            assert step(manager)
            server.shutdown()
            began = time.monotonic()
            with pytest.raises(UnreachableError, match="no quorum for replica group_0"):
                step(manager)
            assert 0.9 < time.monotonic() - began < 5


def test_the_lighthouses_own_answer_is_not_waited_out(store: TCPStore) -> None:
    with lighthouse(2) as server, group(store, server.address()) as (manager,):
        with pytest.raises(TimeoutError, match="1 of at least 2 replicas ask") as raised:
            step(manager)
        assert not isinstance(raised.value, UnreachableError)


def test_who_ends_its_run_does_not_wait_for_it(store: TCPStore) -> None:
    with lighthouse() as server, group(store, server.address()) as (manager,):
        assert step(manager)
        server.shutdown()
        began = time.monotonic()
        assert not manager.final_sync()
        assert time.monotonic() - began < 5


def test_a_manager_that_is_shut_down_does_not_wait_for_it(store: TCPStore) -> None:
    with lighthouse() as server, group(store, server.address(), use_async_quorum=True) as (one,):
        assert step(one)
        server.shutdown()
        one.start_quorum()
        began = time.monotonic()
        one.shutdown()
        assert time.monotonic() - began < 5


def known(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}/status.json", timeout=10) as reply:
        return [one["replica_id"] for one in json.load(reply)["replicas"]]


LIGHTHOUSE = """
import time
from torchft.coordination import LighthouseServer
server = LighthouseServer("127.0.0.1:0", 1, join_timeout_ms=20_000, heartbeat_timeout_ms=1_000)
print(server.address())
time.sleep(600)
"""


def test_a_lighthouse_that_was_stopped_takes_nobody_for_dead() -> None:
    with Child(LIGHTHOUSE) as child, ExitStack() as stack:
        address = child.line()
        servers = [stack.enter_context(server(address, f"{name}:1")) for name in "abc"]
        clients = [ManagerClient(one.address(), connect_timeout=seconds(20)) for one in servers]
        until(lambda: len(known(address)) == 3, "all are heard")
        quorums = []
        for at in range(1, 5):
            quorums += at_once(*(partial(ask, client, step=at) for client in clients))
            child.send(signal.SIGSTOP)
            time.sleep(1.3)  # longer than its heartbeat timeout
            child.send(signal.SIGCONT)
        assert {quorum.replica_world_size for quorum in quorums} == {3}, "somebody was left out"
        assert len({quorum.quorum_id for quorum in quorums}) == 1
        until(
            lambda: "this lighthouse did not run for" in child.stderr, "it says that it stood still"
        )
