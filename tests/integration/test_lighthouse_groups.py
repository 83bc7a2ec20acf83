"""Groups, their ranks and the lighthouse together: over the network as well as in one process."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.coordination import Child, ask, at_once, free_port, group, lighthouse, seconds
from helpers.proxy import Relay
from helpers.waiting import until

from torchft.coordination import LighthouseClient, ManagerClient, ManagerServer
from torchft.errors import QuorumError, StateLostError

GROUP = """
import sys
from datetime import timedelta as T
from torchft.coordination import ManagerServer

lighthouse, name, world_size = sys.argv[1:]
manager = ManagerServer(name, lighthouse, "127.0.0.1", "127.0.0.1:0", "store", int(world_size),
                        T(milliseconds=50), T(seconds=20), 0)
print(manager.address())
sys.stdin.read()
while True:
    import time; time.sleep(1)
"""

ASKS = """
import sys
from datetime import timedelta as T
from torchft.coordination import ManagerClient

address, rank = sys.argv[1:]
client = ManagerClient(address, T(seconds=20))
print("asking")
client._quorum(int(rank), 0, "", False, False, 0, T(seconds=60))
"""


def client_of(manager: ManagerServer) -> ManagerClient:
    return ManagerClient(manager.address(), connect_timeout=seconds(20))


def asks_at(lighthouse_addr: str, name: str) -> int | None:
    """The step at which the lighthouse has a request of `name`; None if it has none."""
    with urllib.request.urlopen(f"{lighthouse_addr}/status.json", timeout=10) as reply:
        replicas = json.load(reply)["replicas"]
    found = [r["asks_at_step"] for r in replicas if r["replica_id"] == name]
    return found[0] if found else None


def test_two_ranks_are_asked_together_and_both_votes_count() -> None:
    with lighthouse() as server, group(server.address(), world_size=2) as manager:
        client = client_of(manager)
        told = at_once(lambda: ask(client, 0, step=3), lambda: ask(client, 1, step=3))
        assert [t.max_step for t in told] == [3, 3]
        assert client._checkpoint_metadata(1, timeout=seconds(5)) == "state of rank 1"

        def vote(*yes: bool) -> list[bool]:
            calls = [
                lambda r=r, y=y: client.should_commit(r, 3, y, timeout=seconds(20))
                for r, y in enumerate(yes)
            ]
            return at_once(*calls)

        assert vote(True, True) == [True, True]
        at_once(lambda: ask(client, 0, step=4), lambda: ask(client, 1, step=4))
        assert vote(True, False) == [False, False]


def test_a_vote_whose_caller_timed_out_has_no_part_in_the_next_step() -> None:
    """An old failing that must not come back: it stays, and one rank or both are told no."""
    with lighthouse() as server, Child(GROUP, server.address(), "a:1", "2") as child:
        client = ManagerClient(child.line(), connect_timeout=seconds(20))
        with pytest.raises(TimeoutError):
            client.should_commit(0, 1, False, timeout=seconds(0.2))
        both = [lambda r=r: client.should_commit(r, 2, True, timeout=seconds(20)) for r in (0, 1)]
        assert at_once(*both) == [True, True]


def test_a_quorum_that_failed_is_told_to_every_rank_at_once() -> None:
    """An old failing that must not come back: the ranks hang until their deadline."""
    with lighthouse() as server, Child(GROUP, server.address(), "a:1", "2") as child:
        client = ManagerClient(child.line(), connect_timeout=seconds(20))
        began = time.monotonic()
        # The lighthouse refuses a step that no group can be at.
        for error in at_once(lambda: ask(client, 0, step=-1), lambda: ask(client, 1, step=-1)):
            assert isinstance(error, QuorumError)
        assert time.monotonic() - began < 10, "a third of their deadlines"


def test_a_manager_in_another_process_is_asked_over_the_network() -> None:
    with lighthouse() as server, Child(GROUP, server.address(), "far:1", "1") as child:
        client = ManagerClient(child.line(), connect_timeout=seconds(20))
        assert ask(client, step=2, timeout=20).replica_ids == ["far:1"]
        assert client.should_commit(0, 2, True, timeout=seconds(20))
        assert client._checkpoint_metadata(0, timeout=seconds(20)) == "state of rank 0"


def test_a_behind_group_heals_from_the_one_ahead() -> None:
    with (
        lighthouse(2) as server,
        group(server.address(), "a:1") as a,
        group(server.address(), "b:1") as b,
    ):
        ahead, behind = at_once(
            lambda: ask(client_of(a), step=5), lambda: ask(client_of(b), step=2)
        )
        assert behind.heal and behind.recover_src_manager_address == a.address()
        assert behind.max_replica_rank is None and behind.max_step == 5
        assert not ahead.heal and ahead.recover_dst_replica_ranks == [1]
        assert ahead.recovering_replica_ranks == behind.recovering_replica_ranks == [1]


def test_a_group_whose_caller_vanished_no_longer_asks_at_the_lighthouse() -> None:
    with lighthouse(2) as server, group(server.address(), "a:1") as manager:
        with Child(ASKS, manager.address(), "0") as child:
            assert child.line() == "asking"
            until(lambda: asks_at(server.address(), "a:1") == 0, "the request arrives")
        until(lambda: asks_at(server.address(), "a:1") is None, "the request is withdrawn")


def test_a_client_that_vanished_no_longer_asks_at_the_lighthouse() -> None:
    asks = ASKS.replace("ManagerClient", "LighthouseClient").replace(
        'client._quorum(int(rank), 0, "", False, False, 0, T(seconds=60))',
        "client.quorum('z:1', T(seconds=60))",
    )
    with lighthouse(2) as server:
        with Child(asks, server.address(), "0") as child:
            assert child.line() == "asking"
            until(lambda: asks_at(server.address(), "z:1") == 0, "the request arrives")
        until(lambda: asks_at(server.address(), "z:1") is None, "the request is withdrawn")


def has_asked(client: ManagerClient, rank: int) -> bool:
    try:
        client._checkpoint_metadata(rank, timeout=seconds(5))
    except RuntimeError:
        return False
    return True


def test_a_rank_that_vanished_is_named_at_once_to_the_ranks_that_wait() -> None:
    with lighthouse() as server, group(server.address(), "a:1", world_size=3) as manager:
        client = client_of(manager)
        with ThreadPoolExecutor(1) as threads, Child(ASKS, manager.address(), "1") as child:
            waiting = threads.submit(ask, client, 0)
            until(lambda: has_asked(client, 0) and has_asked(client, 1), "both ask")
            child.process.kill()
            error = waiting.exception()
        assert isinstance(error, QuorumError)
        assert "group rank 1 of replica a:1" in str(error)


def test_a_killed_manager_ends_its_process_with_code_1_and_a_log_line() -> None:
    grpc = pytest.importorskip("grpc")
    with lighthouse() as server, Child(GROUP, server.address(), "a:1", "1") as child:
        with grpc.insecure_channel(child.line().removeprefix("http://")) as channel:
            kill = channel.unary_unary("/torchft.ManagerService/Kill")
            kill(b"\n\x04test", timeout=20)
        assert child.end() == 1
        assert 'it was told to end: "test"' in child.stderr


def test_a_restarted_lighthouse_is_survived_and_quorum_ids_go_on_rising() -> None:
    """An old failing that must not come back: ids begin anew with each start of the lighthouse."""
    bind = f"127.0.0.1:{free_port()}"
    with lighthouse(bind=bind) as server, group(server.address(), "a:1") as manager:
        client = client_of(manager)
        before = ask(client, step=1).quorum_id
        server.shutdown()
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(ask, client, step=2, timeout=20)
            with lighthouse(bind=bind) as again:
                after = waiting.result()
                assert after.quorum_id > before
                until(lambda: healthy(again.address()) == ["a:1"], "the heartbeat is back")


def healthy(lighthouse_addr: str) -> list[str]:
    with urllib.request.urlopen(f"{lighthouse_addr}/status.json", timeout=10) as reply:
        return [r["replica_id"] for r in json.load(reply)["replicas"] if r["healthy"]]


def test_a_lighthouse_that_goes_while_it_is_waited_for_is_asked_again() -> None:
    bind = f"127.0.0.1:{free_port()}"
    with (
        lighthouse(2, bind=bind) as server,
        group(server.address(), "a:1") as manager,
        ThreadPoolExecutor(1) as threads,
    ):
        waiting = threads.submit(ask, client_of(manager), step=2, timeout=20)
        until(lambda: asks_at(server.address(), "a:1") == 2, "the request arrives")
        server.shutdown()
        with lighthouse(1, bind=bind):
            assert waiting.result().replica_ids == ["a:1"]


def test_a_lighthouse_that_stays_away_is_named_at_the_deadline() -> None:
    with lighthouse() as server, group(server.address(), "a:1") as manager:
        server.shutdown()
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=f"lighthouse {server.address()}.*refused"):
            ask(client_of(manager), timeout=1)
        assert time.monotonic() - began < 1.5


LIGHTHOUSE = """
import time
from torchft.coordination import LighthouseServer
server = LighthouseServer("127.0.0.1:0", 1)
print(server.address())
time.sleep(120)
"""


def test_a_lighthouse_that_hangs_is_noticed_and_its_return_too() -> None:
    with Child(LIGHTHOUSE) as hanging, Child(GROUP, hanging.line(), "a:1", "1") as child:
        client = ManagerClient(child.line(), connect_timeout=seconds(20))
        ask(client, step=1, timeout=20)
        hanging.send(signal.SIGSTOP)
        until(lambda: "lost the lighthouse" in child.stderr, "the heartbeat's deadline passes")
        with pytest.raises(TimeoutError, match="no answer to a quorum request from lighthouse"):
            ask(client, step=2, timeout=0.5)
        hanging.send(signal.SIGCONT)
        until(lambda: "is back" in child.stderr, "the heartbeat is answered again")
        assert ask(client, step=2, timeout=20).max_step == 2


def test_a_connection_that_fell_silent_is_replaced() -> None:
    with lighthouse() as server, Relay(int(server.address().rsplit(":", 1)[1])) as relay:
        address = f"http://127.0.0.1:{relay.port}"
        with Child(GROUP, address, "a:1", "1") as child:
            client = ManagerClient(child.line(), connect_timeout=seconds(20))
            ask(client, step=1, timeout=20)
            assert relay.accepted == 1
            relay.fall_silent()
            until(lambda: "is back" in child.stderr, "a heartbeat passes on a new connection")
            assert ask(client, step=2, timeout=20).max_step == 2


def test_a_group_whose_donors_are_gone_is_told_which_step_is_lost() -> None:
    with (
        lighthouse(3, heartbeat_timeout_ms=300) as server,
        group(server.address(), "a:1") as a,
        group(server.address(), "b:1") as b,
        Child(GROUP, server.address(), "c:1", "1") as c,
    ):
        clients = [client_of(a), client_of(b), ManagerClient(c.line(), seconds(20))]
        asks = zip(clients, [7, 0, 0], strict=True)
        told = at_once(*[lambda c=c, s=s: ask(c, step=s, timeout=20) for c, s in asks])
        assert [t.heal for t in told] == [False, True, True]
        a.shutdown()
        for error in at_once(
            lambda: ask(clients[1], step=0, timeout=20),
            lambda: ask(clients[2], step=0, timeout=20),
        ):
            assert isinstance(error, StateLostError)
            assert "step 7" in str(error)


def test_data_travels_as_json_to_every_member() -> None:
    data = {"text": "ä", "list": [1, 2.5, None], "nested": {"yes": True}}
    with lighthouse(2) as server:
        clients = [LighthouseClient(server.address(), connect_timeout=seconds(5)) for _ in "ab"]
        one, two = at_once(
            lambda: clients[0].quorum("a:1", timeout=seconds(20), data=data, world_size=3),
            lambda: clients[1].quorum("b:1", timeout=seconds(20), step=7),
        )
        assert one.quorum_id == two.quorum_id
        for quorum in (one, two):
            assert [m.data for m in quorum.participants] == [data, None]
            assert [m.step for m in quorum.participants] == [0, 7]
            assert [m.world_size for m in quorum.participants] == [3, 0]
            assert abs(quorum.created.seconds - time.time()) < 60


def test_a_quorum_of_two_forms_although_the_first_asked_long_before() -> None:
    with (
        lighthouse(2) as server,
        group(server.address(), "a:1") as a,
        group(server.address(), "b:1") as b,
        ThreadPoolExecutor(1) as threads,
    ):
        waiting = threads.submit(ask, client_of(a))
        until(lambda: asks_at(server.address(), "a:1") == 0, "the first asks")
        began = time.monotonic()
        ask(client_of(b))
        waiting.result()
        assert time.monotonic() - began < 1, "decided at once, not on a tick"
