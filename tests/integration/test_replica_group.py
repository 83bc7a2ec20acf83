"""How a rank finds its group."""

from __future__ import annotations

import signal
import threading
import time
from datetime import timedelta
from typing import Any

import psutil
import pytest
from helpers.coordination import free_port, lighthouse
from torch.distributed import TCPStore

from torchft.coordination import ManagerClient
from torchft.manager import Manager
from torchft.manager.group import _store
from torchft.process_group import ProcessGroupDummy


class Interrupted(Exception):
    """What a signal handler raises."""


def test_a_store_that_is_not_there_is_named() -> None:
    port = free_port()
    with pytest.raises(TimeoutError, match=rf"127\.0\.0\.1:{port}.*is torchrun running there"):
        _store("127.0.0.1", port, timedelta(seconds=1))


def test_a_signal_is_heard_while_the_store_is_waited_for() -> None:
    def interrupt(*_: Any) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    began = time.monotonic()
    try:
        with pytest.raises(Interrupted):
            _store("127.0.0.1", free_port(), timedelta(seconds=5))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 4
    # The attempt that was left behind is inside torch: this process must not end before it.
    for thread in threading.enumerate():
        if thread.name == "torchft-attempt":
            thread.join(30)


def unreachable(*_: Any, **__: Any) -> None:
    raise TimeoutError("no connection")


def open_ports() -> set[int]:
    """Those that this process listens at."""
    connections = psutil.Process().net_connections(kind="tcp")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": None},
        {"lighthouse_addr": "no address"},
        {"timeout": timedelta(0)},
        {"records": "/dev/null/steps.jsonl"},
        {"client": unreachable},
    ],
    ids=["no rank", "no lighthouse", "no time", "no file of records", "its own server is silent"],
)
def test_a_manager_that_cannot_start_leaves_no_port_open(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    wrong = dict(wrong)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TORCHFT_STEP_RECORDS", wrong.pop("records", ""))
    client = wrong.pop("client", ManagerClient)
    monkeypatch.setattr("torchft.manager.group.ManagerClient", client)
    with lighthouse() as server:
        right: dict[str, Any] = {
            "rank": 0,
            "world_size": 1,
            "store_addr": "127.0.0.1",
            "store_port": store.port,
            "lighthouse_addr": server.address(),
            "hostname": "127.0.0.1",
        }
        before = open_ports()
        # What was raised holds on to the frames, and to all that was made in them.
        with pytest.raises((RuntimeError, ValueError, OSError)) as raised:
            Manager(ProcessGroupDummy(0, 1), None, None, 1, **{**right, **wrong})
        assert not open_ports() - before, raised


def test_rank_0_serves_the_store_where_torchruns_agent_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with lighthouse() as server:
        managers = [
            Manager(
                ProcessGroupDummy(0, 1),
                None,
                None,
                1,
                lighthouse_addr=server.address(),
                hostname="127.0.0.1",
                connect_timeout=timedelta(seconds=5),
            )
            for _ in range(2)  # the second one finds it served
        ]
        assert port in open_ports()
        for manager in managers:
            manager.shutdown()


def test_a_store_that_is_served_is_only_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    served.set("from", "elsewhere")
    mine = _store("127.0.0.1", served.port, timedelta(seconds=5), serves=True)
    assert mine.get("from") == b"elsewhere"
