"""Existing torchft against ours, each in its own process: its clients and managers with our
servers, ours with its.

Runs when `TORCHFT_EXISTING` names a directory into which a wheel of an existing torchft (of October
2025 or later, whose wire this is) was unpacked; nothing of it is part of this repository.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.coordination import Child, ask, at_once, group, lighthouse, seconds

from torchft.coordination import LighthouseClient, ManagerClient

EXISTING = os.environ.get("TORCHFT_EXISTING", "")

pytestmark = pytest.mark.skipif(
    not EXISTING, reason="TORCHFT_EXISTING names no directory with an unpacked wheel of torchft"
)

THEIRS = """
import json, sys, time
from datetime import timedelta as T
from importlib import machinery, util

def load(path):
    loader = machinery.ExtensionFileLoader("_torchft", path)
    module = util.module_from_spec(util.spec_from_loader("_torchft", loader))
    loader.exec_module(module)
    return module

def lighthouse(min_replicas):
    server = theirs.LighthouseServer(bind="[::]:0", min_replicas=int(min_replicas))
    print("http://localhost:" + server.address().rsplit(":", 1)[1])
    time.sleep(120)

def manager(lighthouse, name):
    server = theirs.ManagerServer(
        replica_id=name, lighthouse_addr=lighthouse, hostname="localhost", bind="[::]:0",
        store_addr="store-of-" + name, world_size=1, heartbeat_interval=T(milliseconds=100),
        connect_timeout=S, quorum_retries=0)
    print(server.address())
    time.sleep(120)

def step(manager, step):
    client = theirs.ManagerClient(manager, S)
    arguments = dict(group_rank=0, step=int(step), checkpoint_metadata="theirs", shrink_only=False,
                     timeout=S, commit_failures=0, init_sync=False)
    try:
        quorum = client._quorum(**arguments)
    except TypeError:  # later versions ask for one more
        quorum = client._quorum(**arguments, reconfigure_handle="")
    vote = client.should_commit(0, int(step), True, timeout=S)
    names = ["quorum_id", "replica_rank", "replica_world_size", "max_step", "heal",
             "recover_src_replica_rank", "recover_dst_replica_ranks", "store_address"]
    told = {name: getattr(quorum, name) for name in names}
    print(json.dumps({**told, "vote": vote, "metadata": client._checkpoint_metadata(0, timeout=S)}))

def times_out(lighthouse):
    client = theirs.LighthouseClient(lighthouse, S)
    client.heartbeat("theirs:1")
    try:
        client.quorum("theirs:1", T(seconds=1))
    except TimeoutError as error:
        print(error)

S = T(seconds=20)
theirs = load(sys.argv[1])
globals()[sys.argv[2]](*sys.argv[3:])
"""


def theirs(do: str, *args: str) -> Child:
    (extension,) = Path(EXISTING).glob("torchft/_torchft*.so")
    return Child(THEIRS, str(extension), do, *args, PYTHONPATH="", RUST_LOG="error")


def told(child: Child) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(child.line())
    return found


@pytest.fixture
def their_lighthouse() -> Iterator[str]:
    with theirs("lighthouse", "2") as child:
        yield child.line()


def test_their_managers_and_clients_with_our_lighthouse() -> None:
    with (
        lighthouse(2) as server,
        theirs("manager", server.address(), "a:1") as a,
        theirs("manager", server.address(), "b:1") as b,
        theirs("step", a.line(), "3") as behind,
        theirs("step", b.line(), "5") as ahead,
    ):
        one, two = told(behind), told(ahead)
    assert one["quorum_id"] == two["quorum_id"] > 0
    assert (one["heal"], one["recover_src_replica_rank"], one["max_step"]) == (True, 1, 5)
    assert (two["heal"], two["recover_dst_replica_ranks"]) == (False, [0])
    assert one["vote"] and two["vote"]


def test_their_client_with_our_manager() -> None:
    with (
        lighthouse(1) as server,
        group(server.address(), "ours:1") as manager,
        theirs("step", manager.address(), "4") as client,
    ):
        got = told(client)
    assert (got["replica_rank"], got["replica_world_size"], got["max_step"]) == (0, 1, 4)
    assert got["store_address"] == "store-of-ours:1"
    assert got["vote"] and got["metadata"] == "theirs"


def test_our_client_with_their_manager() -> None:
    with lighthouse(1) as server, theirs("manager", server.address(), "theirs:1") as manager:
        client = ManagerClient(manager.line(), connect_timeout=seconds(20))
        result = ask(client, step=6, timeout=20)
        assert (result.replica_world_size, result.max_step, result.heal) == (1, 6, False)
        assert client.should_commit(0, 6, True, timeout=seconds(20))
        assert client._checkpoint_metadata(0, timeout=seconds(20)) == "state of rank 0"


def test_our_managers_with_their_lighthouse(their_lighthouse: str) -> None:
    with group(their_lighthouse, "a:1") as a, group(their_lighthouse, "b:1") as b:
        clients = [ManagerClient(m.address(), connect_timeout=seconds(20)) for m in (a, b)]
        behind, ahead = at_once(
            lambda: ask(clients[0], step=2, timeout=20), lambda: ask(clients[1], step=5, timeout=20)
        )
    assert behind.replica_ids == ahead.replica_ids == ["a:1", "b:1"]
    assert (behind.heal, ahead.heal, behind.max_step) == (True, False, 5)


def test_our_client_with_their_lighthouse(their_lighthouse: str) -> None:
    clients = [LighthouseClient(their_lighthouse, connect_timeout=seconds(20)) for _ in "ab"]
    clients[0].heartbeat("a:1")
    quorums = at_once(
        lambda: clients[0].quorum("a:1", timeout=seconds(20), data={"x": 1}),
        lambda: clients[1].quorum("b:1", timeout=seconds(20)),
    )
    assert [m.data for m in quorums[0].participants] == [{"x": 1}, None]


def test_a_group_of_each_kind_is_kept_out_of_the_others_quorum() -> None:
    with (
        lighthouse(1) as server,
        group(server.address(), "ours:1") as ours,
        theirs("manager", server.address(), "theirs:1") as manager,
    ):
        client = ManagerClient(ours.address(), connect_timeout=seconds(20))
        ask(client, step=7, timeout=20)
        with theirs("step", manager.line(), "9") as their_client:
            alone = ask(client, step=8, timeout=20)
            assert their_client.process.poll() is None
    assert alone.replica_ids == ["ours:1"]


def test_their_client_is_told_why_at_its_deadline() -> None:
    with lighthouse(2) as server, theirs("times_out", server.address()) as client:
        assert "1 of at least 2 replicas ask" in client.line()
