"""Signals, forks, exits: a process that waits can be stopped, and one that stops leaves nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from helpers.coordination import Child, ask, group, lighthouse, seconds
from helpers.waiting import until

from torchft.coordination import LighthouseClient, ManagerClient
from torchft.launch.processes import is_dead

WAITS_FOR_A_QUORUM = """
import sys
from datetime import timedelta as T
from torchft.coordination import LighthouseClient, LighthouseServer, ManagerClient, ManagerServer

server = LighthouseServer("127.0.0.1:0", 2)
manager = ManagerServer("a:1", server.address(), "127.0.0.1", "127.0.0.1:0", "", 1,
                        T(milliseconds=50), T(seconds=5), 0)
client = ManagerClient(manager.address(), T(seconds=5))
print("waiting")
client._quorum(0, 0, "", False, False, 0, T(seconds=60))
"""


def test_ctrl_c_ends_a_60_s_quorum_wait_within_a_second() -> None:
    with Child(WAITS_FOR_A_QUORUM) as child:
        assert child.line() == "waiting"
        began = time.monotonic()
        child.send(signal.SIGINT)
        child.end()
        assert time.monotonic() - began < 1
        assert "KeyboardInterrupt" in child.stderr


WAITS_IN_A_MANAGER = """
from datetime import timedelta as T
import torch.distributed as dist
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer

lighthouse = LighthouseServer("127.0.0.1:0", 1)
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
manager = Manager(pg=ProcessGroupGloo(timeout=T(seconds=5)), load_state_dict=lambda state: None,
                  state_dict=dict, min_replica_size=1, rank=0, world_size=1,
                  store_addr="127.0.0.1", store_port=store.port, replica_id="a",
                  lighthouse_addr=lighthouse.address(), hostname="127.0.0.1")
manager.start_quorum()
manager.should_commit()
lighthouse.shutdown()
import atexit
atexit.register(print, "exits")
manager.start_quorum()  # in the background: 60 s
print("waiting")
manager.wait_quorum()
"""


def test_ctrl_c_ends_a_manager_whose_quorum_forms_in_the_background() -> None:
    with Child(WAITS_IN_A_MANAGER, OMP_NUM_THREADS="1") as child:
        assert child.line() == "waiting"
        began = time.monotonic()
        child.send(signal.SIGINT)
        assert child.line() == "exits"
        assert time.monotonic() - began < 1
        child.end()
        assert "KeyboardInterrupt" in child.stderr


WAITS_FOR_A_PEER = """
import threading, time
from datetime import timedelta as T
import torch.distributed as dist
from torchft import ProcessGroupGloo

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
groups = [ProcessGroupGloo(timeout=T(seconds=20)) for _ in range(8)]
for n, group in enumerate(groups):
    place = f"127.0.0.1:{store.port}/{n}"
    threading.Thread(target=group.configure, args=(place, "a", 0, 2), daemon=True).start()
print("waiting")
while True:  # one long sleep would miss a signal that comes just before it
    time.sleep(0.05)
"""


def test_ctrl_c_while_a_process_group_is_made_is_no_crash() -> None:
    """Threads that came back from torch into the end of the interpreter ended it by SIGABRT."""
    with Child(WAITS_FOR_A_PEER, OMP_NUM_THREADS="1") as child:
        assert child.line() == "waiting"
        child.send(signal.SIGINT)
        assert child.end() == -signal.SIGINT, child.stderr
        assert "terminate called" not in child.stderr


def test_a_daemon_thread_that_waits_does_not_hold_the_exit_up() -> None:
    code = WAITS_FOR_A_QUORUM.replace(
        "client._quorum(0",
        "import threading\nthreading.Thread(daemon=True, target=lambda: client._quorum(0",
    ).replace("T(seconds=60))", "T(seconds=60))).start()\nprint('end')")
    with Child(code) as child:
        began = time.monotonic()
        assert child.line() == "waiting"
        assert child.line() == "end"
        assert child.end() == 0, child.stderr
        assert time.monotonic() - began < 3
        assert "panicked" not in child.stderr


def test_shutdown_twice_is_once_and_leaves_no_port() -> None:
    with lighthouse() as server, group(server.address()) as manager:
        addresses = [manager.address(), server.address()]
        for _ in range(2):
            manager.shutdown()
            server.shutdown()
        for address in addresses:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), 1)


def test_a_dropped_server_closes_its_port() -> None:
    with lighthouse() as server:
        manager_cm = group(server.address(), "dropped:1")
        manager = manager_cm.__enter__()
        port = int(manager.address().rsplit(":", 1)[1])
        del manager, manager_cm

        def is_closed() -> bool:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except ConnectionRefusedError:
                return True
            return False

        until(is_closed, "the port of a dropped server is closed")


def test_one_runtime_serves_any_number_of_servers_and_clients() -> None:
    with lighthouse() as server:
        LighthouseClient(server.address(), connect_timeout=seconds(5)).heartbeat("a:1")
        before = psutil.Process().num_threads()
        clients = [LighthouseClient(server.address(), connect_timeout=seconds(5)) for _ in range(8)]
        for client in clients:
            client.heartbeat("a:1")
        with group(server.address(), "a:2"), group(server.address(), "b:2"):
            assert psutil.Process().num_threads() <= before + 1  # at most one for a name look-up


def in_fork(story: object, path: Path) -> str:
    """What `story()` returns or raises in a forked child."""
    pid = os.fork()
    if pid == 0:
        try:
            text = str(story())  # type: ignore[operator]
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        path.write_text(text)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0
    return path.read_text()


def test_a_handle_after_a_fork_raises_a_clear_error(tmp_path: Path) -> None:
    with lighthouse() as server, group(server.address()) as manager:
        client = LighthouseClient(server.address(), connect_timeout=seconds(5))
        ranks = ManagerClient(manager.address(), connect_timeout=seconds(5))
        calls = {
            "LighthouseClient": lambda: client.heartbeat("a:1"),
            "ManagerClient": lambda: ask(ranks),
            "LighthouseServer": server.shutdown,
            "ManagerServer": manager.shutdown,
        }
        for name, call in calls.items():
            told = in_fork(call, tmp_path / name)
            assert f"RuntimeError: this {name} was made in process {os.getpid()}" in told
        client.heartbeat("a:1")


def test_a_child_of_a_fork_makes_its_own_handles(tmp_path: Path) -> None:
    def story() -> str:
        LighthouseClient(address, connect_timeout=seconds(10)).heartbeat("child:1")
        return "beat"

    with lighthouse() as server:
        address = server.address()
        assert in_fork(story, tmp_path / "said") == "beat"


def test_a_manager_of_the_parent_is_reached_by_the_network_from_a_fork(tmp_path: Path) -> None:
    def story() -> str:
        return ask(ManagerClient(address, connect_timeout=seconds(10)), timeout=10).replica_ids[0]

    with lighthouse() as server, group(server.address(), "parent:1") as manager:
        address = manager.address()
        ManagerClient(address, connect_timeout=seconds(5))
        assert in_fork(story, tmp_path / "said") == "parent:1"


class Numbers:
    """A data set that looks at a handle of the process that made it."""

    def __init__(self, client: LighthouseClient) -> None:
        self.client = client

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> int:
        return i


def test_a_data_loader_with_forked_workers_exits_cleanly() -> None:
    from torch.utils.data import DataLoader

    with lighthouse() as server:
        client = LighthouseClient(server.address(), connect_timeout=seconds(5))
        client.heartbeat("a:1")
        context = multiprocessing.get_context("fork")
        loader: DataLoader[int] = DataLoader(
            Numbers(client),  # type: ignore[arg-type]
            batch_size=2,
            num_workers=2,
            multiprocessing_context=context,
        )
        assert [int(n) for batch in loader for n in batch] == list(range(8))
        assert not multiprocessing.active_children()
        client.heartbeat("a:1")


WATCHES_ITS_PARENT = """
import subprocess, sys, time
child = '''
import os, time
from torchft.coordination import watch_parent
watch_parent(); watch_parent()
print(os.getpid())
time.sleep(60)
'''
subprocess.Popen([sys.executable, "-u", "-c", child]).wait()
"""


@pytest.fixture
def orphan() -> Iterator[psutil.Process]:
    """A process that watches its parent, which has just been killed."""
    with Child(WATCHES_ITS_PARENT) as agent:
        worker = psutil.Process(int(agent.line()))
        agent.send(signal.SIGKILL)
        yield worker
        if worker.is_running():
            worker.kill()


def test_a_worker_whose_agent_was_killed_ends_within_a_second(orphan: psutil.Process) -> None:
    began = time.monotonic()
    until(lambda: is_dead(orphan), "the worker's end")
    assert time.monotonic() - began < 1


def test_only_the_main_thread_is_needed_to_wait() -> None:
    with lighthouse(2) as server, group(server.address(), "a:1") as one:
        client = ManagerClient(one.address(), connect_timeout=seconds(5))
        got: list[int] = []
        waiter = threading.Thread(target=lambda: got.append(ask(client).replica_world_size))
        waiter.start()
        with group(server.address(), "b:1") as two:
            ask(ManagerClient(two.address(), connect_timeout=seconds(5)))
        waiter.join(10)
        assert got == [2]
