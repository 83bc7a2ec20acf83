"""A generation is abandoned at once, stands anew at once, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import ReduceOp, TCPStore

from tests.helpers.ranks import Rank, ranks
from torchft.errors import CollectiveError, MeetingTimeoutError
from torchft.process_group import ProcessGroupGloo
from torchft.retry import wait_until

ABANDONED_S = 0.1
linux = pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="elsewhere a retired group waits for its deadline"
)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _sum(rank: Rank, elements: int = 1024) -> float:
    tensor = torch.full((elements,), float(rank.rank + 1))
    rank.group.allreduce([tensor], ReduceOp.SUM).wait()
    assert bool((tensor == tensor[0]).all())
    return float(tensor[0])


def _outlive_a_silent_peer(rank: Rank) -> None:
    group = rank.configure()
    rank.tell(_sum(rank))
    rank.listen()  # the last rank never hears
    tensor = torch.ones(1 << 20)
    work = group.allreduce([tensor], ReduceOp.SUM)
    rank.tell("waiting")
    rank.listen()
    began = time.perf_counter()
    group.abort()
    abort_s = time.perf_counter() - began
    assert wait_until(work.is_completed, 10.0)
    ended_s = time.perf_counter() - began
    with pytest.raises(RuntimeError):  # torch reads its own symbols for this: slow the first time
        work.wait()
    assert isinstance(group.errored(), CollectiveError)
    with pytest.raises(CollectiveError, match="abandoned"):
        group.allreduce([tensor], ReduceOp.SUM)
    began = time.perf_counter()
    rank.configure(world_size=rank.world_size - 1)
    configured_s = time.perf_counter() - began
    assert group.errored() is None
    rank.tell((abort_s, ended_s, configured_s, _sum(rank, 1 << 20)))


@linux
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_peer_falls_silent_in_an_all_reduce_and_the_others_go_on(count: int) -> None:
    with ranks(count, _outlive_a_silent_peer) as world:
        assert world.hear_all() == [count * (count + 1) / 2] * count
        world.silence(count - 1)
        survivors = range(count - 1)
        world.tell("reduce", *survivors)
        world.hear_all(*survivors)
        world.tell("abort", *survivors)
        for abort_s, ended_s, configured_s, total in world.hear_all(*survivors):
            assert abort_s < ABANDONED_S
            assert ended_s < ABANDONED_S
            assert configured_s < 1.0  # ours of 20 s; survivors abort one after the other
            assert total == (count - 1) * count / 2


def _drop_a_pending_group(rank: Rank) -> None:
    group = rank.configure()
    _sum(rank)
    rank.tell("met")
    rank.listen()
    work = group.allreduce([torch.ones(1 << 20)], ReduceOp.SUM)
    began = time.perf_counter()
    rank.configure(rank=0, world_size=1)  # the old generation is nobody's now
    rank.tell((time.perf_counter() - began, _sum(rank)))
    with pytest.raises(RuntimeError):
        work.wait()
    rank.tell("ended")


@linux
def test_configure_does_not_wait_for_an_operation_that_is_still_pending() -> None:
    with ranks(2, _drop_a_pending_group, timeout_s=60) as world:
        world.hear_all()
        world.silence(1)
        world.tell("reduce", 0)
        configured_s, total = world.hear(0)
        assert configured_s < 1.0
        assert total == 1.0
        assert world.hear(0) == "ended"


def _leave_the_end_to_the_reaper(rank: Rank) -> None:
    from torchft.process_group import sockets

    sockets.visible = lambda: False  # as on systems that do not show a process its sockets
    group = rank.configure()
    _sum(rank)
    rank.tell("met")
    rank.listen()
    if rank.rank == 0:
        work = group.allreduce([torch.full((1 << 22,), 1.0)], ReduceOp.SUM)
        began = time.perf_counter()
        group.abort()
        group = rank.configure(rank=0, world_size=1)
        del group
        gc.collect()
        rank.tell(time.perf_counter() - began)
        churn = [torch.full((1 << 22,), 7.0) for _ in range(8)]
        work.wait()
        del churn
    else:
        tensor = torch.full((1 << 22,), 2.0)
        group.allreduce([tensor], ReduceOp.SUM).wait()
        rank.tell((float(tensor.min()), float(tensor.max())))
    rank.listen()


def test_without_sockets_the_reaper_keeps_the_group_and_its_buffers_until_the_work_ends() -> None:
    with ranks(2, _leave_the_end_to_the_reaper, timeout_s=60) as world:
        world.hear_all()
        world.silence(1)
        world.tell("reduce", 0, 1)
        assert world.hear(0) < 1.0
        world.wake(1)
        assert world.hear(1) == (3.0, 3.0)  # the buffer that rank 0 let go of was still its own


def _reconfigure_often(rank: Rank, times: int) -> None:
    def tasks() -> int:
        return len(os.listdir("/proc/self/task"))

    for _ in range(3):
        rank.configure()
        _sum(rank)
    seen = []
    for _ in range(times):
        rank.configure()
        assert _sum(rank) == 3.0
        # The one that went is freed on the reaper's thread, a moment later.
        seen.append((_descriptors(), tasks()))
    first = seen[: times // 5]
    before = max(files for files, _ in first), max(threads for _, threads in first)
    settled = wait_until(lambda: _descriptors() <= before[0] and tasks() <= before[1], 10.0)
    rank.tell((settled, before, (_descriptors(), tasks())))
    rank.listen()


@linux
def test_fifty_generations_leak_neither_descriptors_nor_threads() -> None:
    with ranks(2, _reconfigure_often, 50) as world:
        for settled, before, after in world.hear_all():
            assert settled, f"(descriptors, threads) went from {before} to {after}"


def _abort_beside_other_connections(rank: Rank) -> None:
    listener = socket.create_server(("localhost", 0))
    stop = threading.Event()
    pairs = []

    def connect() -> None:
        while not stop.is_set() and len(pairs) < 200:
            there = socket.create_connection(listener.getsockname()[:2])
            pairs.append((there, listener.accept()[0]))

    busy = threading.Thread(target=connect)
    busy.start()
    group = rank.configure()
    stop.set()
    busy.join()
    _sum(rank)
    store = group.generation.store
    rank.tell(len(group.generation.members))
    rank.listen()
    work = group.allreduce([torch.ones(1 << 20)], ReduceOp.SUM)
    group.abort()
    with pytest.raises(RuntimeError):
        work.wait()
    for there, here in pairs:
        there.sendall(b"!")
        assert here.recv(1) == b"!"
    listener.close()
    store.set("still", "here")
    rank.tell((store.get("still"), len(pairs)))


@linux
def test_an_abort_cuts_no_connection_but_its_own() -> None:
    with ranks(2, _abort_beside_other_connections) as world:
        world.hear_all()
        world.silence(1)
        world.tell("abort", 0)
        still, pairs = world.hear(0)
        assert still == b"here"
        assert pairs > 0


def _lose_a_forked_child(rank: Rank) -> None:
    group = rank.configure()
    if rank.rank == 0:
        child = os.fork()
        if child == 0:
            group.abort()
            rank.group = group = None
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    rank.tell(_sum(rank))


@linux
def test_a_forked_child_that_drops_the_group_does_not_end_its_parents() -> None:
    with ranks(2, _lose_a_forked_child) as world:
        assert world.hear_all() == [3.0, 3.0]


def _configure_after_a_death(rank: Rank) -> None:
    rank.configure()
    _sum(rank)
    rank.tell("met")
    rank.listen()
    began = time.perf_counter()
    rank.configure(world_size=2)
    rank.tell((time.perf_counter() - began, _sum(rank)))


def test_after_a_peer_died_the_survivors_stand_at_once() -> None:
    with ranks(3, _configure_after_a_death) as world:
        world.hear_all()
        world.kill(2)
        world.tell("configure", 0, 1)
        for configured_s, total in world.hear_all(0, 1):
            assert configured_s < 1.0
            assert total == 3.0


def _wait_for_one_who_never_comes(rank: Rank) -> None:
    began = time.perf_counter()
    with pytest.raises(MeetingTimeoutError) as caught:
        rank.configure(world_size=4)
    rank.tell((time.perf_counter() - began, str(caught.value), rank.store))
    assert rank.group.errored() is None
    rank.configure()  # the next one is not the worse for it
    rank.tell(_sum(rank))


def test_configure_with_absent_peers_names_them_at_the_deadline() -> None:
    with ranks(2, _wait_for_one_who_never_comes, timeout_s=0.5) as world:
        for waited_s, message, store in world.hear_all():
            assert 0.4 < waited_s < 2.0
            assert "ranks 2, 3" in message
            assert store in message
            assert "0.5 s" in message
        assert world.hear_all() == [3.0, 3.0]


def _abort_while_configuring(rank: Rank) -> None:
    from torchft.process_group import ProcessGroupGloo

    rank.group = ProcessGroupGloo(rank.timeout)
    failures = []

    def configure() -> None:
        try:
            rank.configure(world_size=2)
        except CollectiveError as error:
            failures.append(str(error))

    forming = threading.Thread(target=configure)
    forming.start()
    while forming.is_alive():  # before it has begun there is nothing to abandon
        rank.group.abort()
        forming.join(0.01)
    rank.tell(failures)


def test_an_abort_ends_a_configure_that_waits_for_a_peer() -> None:
    with ranks(1, _abort_while_configuring, timeout_s=60) as world:
        (failure,) = world.hear(0)
        assert "abandoned while waiting for ranks [1]" in failure


def _hold_a_generation(rank: Rank) -> None:
    old = rank.configure().generation
    rank.configure()
    tensor = torch.ones(8)
    old.allreduce([tensor], ReduceOp.SUM).wait()
    rank.tell((float(tensor[0]), old is rank.group.generation, old.retired))
    rank.listen()


def test_a_generation_that_somebody_holds_outlives_a_newer_one() -> None:
    with ranks(2, _hold_a_generation) as world:
        assert world.hear_all() == [(2.0, False, False)] * 2


@linux
@pytest.mark.parametrize("leaver", range(3))
def test_one_of_three_members_in_a_process_leaves_and_the_others_go_on(store, leaver: int) -> None:
    groups = [ProcessGroupGloo(timedelta(seconds=20)) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        address = f"localhost:{store.port}/three/{leaver}"
        list(pool.map(lambda rank: groups[rank].configure(address, f"r{rank}", rank, 3), range(3)))
        one, other = (rank for rank in range(3) if rank != leaver)
        groups[leaver].shutdown()
        # Both ways, so that a connection that was cut is seen from either end.
        for sender, receiver in ((one, other), (other, one)):
            sent = groups[sender].send([torch.tensor([7.0])], receiver, 0)
            groups[receiver].recv([got := torch.zeros(1)], sender, 0).wait()
            sent.wait()
            assert got.item() == 7.0
    for group in groups:
        group.shutdown()


_EXIT = """
import threading, torch
from datetime import timedelta
from torch.distributed import ReduceOp, TCPStore
from torchft.process_group import ProcessGroupGloo
store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
groups = [ProcessGroupGloo(timedelta(seconds=60)) for _ in range(2)]
def configure(rank):
    groups[rank].configure(f"localhost:{store.port}/q", "r", rank, 2)
threads = [threading.Thread(target=configure, args=(rank,)) for rank in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
work = groups[0].allreduce([torch.ones(1 << 20)], ReduceOp.SUM)
print("pending", flush=True)
"""


@linux
def test_a_process_with_a_pending_operation_can_end() -> None:
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-c", _EXIT], capture_output=True, text=True, timeout=40, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "pending\n"
    assert time.perf_counter() - began < 30


def _meet_at_a_silent_store(rank: Rank) -> None:
    if rank.rank == 1:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        rank.tell(store.port)
        rank.listen()
    rank.store = f"localhost:{rank.listen()}"
    rank.configure(rank=0, world_size=1)  # it still answers
    rank.tell("ready")
    rank.listen()
    began = time.perf_counter()
    with pytest.raises(MeetingTimeoutError) as caught:
        rank.configure(rank=0, world_size=1)
    rank.tell((time.perf_counter() - began, str(caught.value), rank.store))


def test_a_store_that_falls_silent_is_named_at_the_deadline() -> None:
    with ranks(2, _meet_at_a_silent_store, timeout_s=0.5) as world:
        world.tell(world.hear(1), 0)
        world.hear(0)
        world.silence(1)
        world.tell("configure", 0)
        waited_s, message, store = world.hear(0)
        assert waited_s < 3.0  # the operation itself would hang for ever
        assert store in message
