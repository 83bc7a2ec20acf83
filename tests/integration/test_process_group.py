"""The family of process groups: what gloo does with tensors and with errors, how one is made."""

from __future__ import annotations

import gc
import os
import resource
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import Rank, ranks
from torch.distributed import PrefixStore, ReduceOp, TCPStore
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllreduceOptions,
    AllToAllOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)

from torchft.errors import CollectiveError, MismatchError, PhaseError, SettingsError
from torchft.process_group import (
    ProcessGroup,
    ProcessGroupDummy,
    ProcessGroupGloo,
    create_store_client,
    gloo,
    sockets,
)
from torchft.process_group.rendezvous import Member, Seat, _check

SECOND = timedelta(seconds=1)
LONG = timedelta(seconds=20)


@pytest.fixture
def alone(store):
    """A gloo group of one member."""
    group = ProcessGroupGloo(LONG)
    group.configure(f"localhost:{store.port}/alone", "me", 0, 1)
    yield group
    group.shutdown()


# ---------------------------------------------------------------------- operations


def _use_every_operation(rank: Rank) -> None:
    group = rank.configure()
    me, count = rank.rank, rank.world_size
    generation = group.generation
    sent = {}

    def counted(name, work) -> None:
        before = sent.get("total", 0)
        assert work.wait()
        sent["total"] = generation.bytes_sent
        sent[name] = generation.bytes_sent - before

    mine = torch.full((6,), float(me + 1))
    total = sum(range(1, count + 1))

    counted("allreduce", group.allreduce([x := mine.clone()], ReduceOp.SUM))
    assert x.tolist() == [total] * 6
    opts = AllreduceOptions()
    opts.reduceOp = ReduceOp.MAX
    group.allreduce([x := mine.clone()], opts).wait()
    assert x.tolist() == [count] * 6
    sent["total"] = generation.bytes_sent
    pair = [mine.clone(), mine[:3].clone()]
    counted("coalesced", group.allreduce_coalesced(pair, AllreduceCoalescedOptions()))
    assert [x.tolist() for x in pair] == [[total] * 6, [total] * 3]

    rows = [torch.empty(6) for _ in range(count)]
    counted("allgather", group.allgather([rows], [mine], AllgatherOptions()))
    assert [x[0].item() for x in rows] == [1.0, 2.0, 3.0]
    flat = torch.empty(6 * count)
    short = torch.empty(2 * count)
    counted("into_tensor", group.allgather_into_tensor_coalesced([flat, short], [mine, mine[:2]]))
    assert flat.tolist() == [1.0] * 6 + [2.0] * 6 + [3.0] * 6
    assert short.tolist() == [1.0] * 2 + [2.0] * 2 + [3.0] * 2

    counted("one", group.broadcast_one(x := mine.clone(), root=1))
    assert x.tolist() == [2.0] * 6
    opts = BroadcastOptions()
    opts.rootRank = 2
    group.broadcast([x := mine.clone()], opts).wait()
    assert x.tolist() == [3.0] * 6
    sent["total"] = generation.bytes_sent

    out = torch.empty(6)
    counted("alltoall", group.alltoall_base(out, mine, [], [], AllToAllOptions()))
    assert out.tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]

    if me == 0:
        counted("send", group.send([mine], 1, 7))
    elif me == 1:
        counted("recv", group.recv([x := torch.empty(6)], 0, 7))
        assert x.tolist() == [1.0] * 6
    group.barrier().wait()
    assert group.size() == group.generation.size() == count
    assert [member.replica_id for member in generation.members] == [
        f"replica_{other}" for other in range(count)
    ]
    group.abort()
    rank.tell((sent, group.bytes_sent))


def test_every_operation_of_gloo_gives_the_right_numbers_and_counts_its_bytes() -> None:
    with ranks(3, _use_every_operation) as world:
        for me, (sent, ever) in enumerate(world.hear_all()):
            assert sent["allreduce"] == 24 * 2 * 2 // 3
            assert sent["coalesced"] == 36 * 2 * 2 // 3
            assert sent["allgather"] == 24 * 2
            assert sent["into_tensor"] == (24 + 8) * 2
            assert sent["one"] == (24 * 2 if me == 1 else 0)
            assert sent["alltoall"] == 24 * 2 // 3
            assert sent.get("send", 24) == 24
            assert sent.get("recv", 0) == 0
            assert ever == sent["total"]


def _wait_with_deadlines(rank: Rank) -> None:
    group = rank.configure()
    if rank.rank == 1:
        rank.listen()
        return
    work = group.allreduce([torch.ones(8)], ReduceOp.SUM)
    began = time.perf_counter()
    with pytest.raises(RuntimeError):
        work.wait(timedelta(seconds=0.2))
    rank.tell(time.perf_counter() - began)
    group.abort()
    rank.configure(rank=0, world_size=1)
    rank.tell("made anew")


def test_a_works_wait_honours_its_timeout() -> None:
    with ranks(2, _wait_with_deadlines) as world:
        assert 0.1 < world.hear(0) < 2.0  # the group's own is 20 s
        assert world.hear(0) == "made anew"


def test_a_generation_is_made_with_the_groups_own_deadline() -> None:
    with ranks(2, _time_out, timeout_s=1.0) as world:
        assert 0.5 < world.hear(0) < 3.0  # all of it, not the part it had for connecting


def _time_out(rank: Rank, set_s: float | None = None) -> None:
    group = rank.configure()
    if set_s is not None:
        group.set_timeout(timedelta(seconds=set_s))
    if rank.rank == 1:
        rank.listen()
        return
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        group.allreduce([torch.ones(8)], ReduceOp.SUM).wait()
    rank.tell(time.perf_counter() - began)


@pytest.mark.skipif(
    not hasattr(dist.ProcessGroupGloo, "set_timeout"),
    reason="in this torch a gloo group keeps the timeout it was made with",
)
def test_an_operation_keeps_the_deadline_that_set_timeout_gave() -> None:
    with ranks(2, _time_out, 0.2) as world:
        assert 0.1 < world.hear(0) < 2.0


def _reduce_and_scatter(rank: Rank) -> None:
    group = rank.configure()
    me, count = rank.rank, rank.world_size
    rows = [torch.full((2, 2), float(10 * row + me)) for row in range(count)]
    mine = torch.empty(2, 2)
    group.reduce_scatter([mine], [rows]).wait()
    assert mine.tolist() == [[30.0 * me + 3.0] * 2] * 2
    long, short = torch.arange(6.0) + me, torch.full((3, 2), me)
    parts = [torch.empty(2), torch.empty(1, 2, dtype=torch.int64)]
    work = group.reduce_scatter_tensor_coalesced(parts, [long, short])
    assert work.wait(LONG)
    assert parts[0].tolist() == [6.0 * me + 3.0, 6.0 * me + 6.0]
    assert parts[1].tolist() == [[3, 3]]
    opts = ReduceScatterOptions()
    opts.reduceOp = ReduceOp.MAX
    group.reduce_scatter([mine], [rows], opts).wait()
    assert mine.tolist() == [[10.0 * me + 2] * 2] * 2
    opts.reduceOp = ReduceOp.AVG
    with pytest.raises(SettingsError, match=r"AVG of torch\.int64"):
        group.reduce_scatter_tensor_coalesced([parts[1]], [short], opts)
    with pytest.raises(SettingsError, match=r"AVG of torch\.int64"):
        group.allreduce([short], ReduceOp.AVG)
    rank.tell("done")


def test_gloo_reduces_and_scatters() -> None:
    with ranks(3, _reduce_and_scatter) as world:
        assert world.hear_all() == ["done"] * 3


@pytest.mark.parametrize(
    "operation",
    [
        lambda group: group.configure("", "", 0, 1),
        lambda group: group.abort(),
        lambda group: group.shutdown(),
        lambda group: group.set_timeout(SECOND),
        lambda group: group.size(),
        lambda group: group.getBackendName(),
        lambda group: group.allreduce([], ReduceOp.SUM),
        lambda group: group.allreduce_coalesced([]),
        lambda group: group.allgather([], []),
        lambda group: group.allgather_into_tensor_coalesced([], []),
        lambda group: group.alltoall_base(None, None, [], []),
        lambda group: group.barrier(),
        lambda group: group.broadcast([]),
        lambda group: group.broadcast_one(torch.ones(1), 0),
        lambda group: group.send([], 0, 0),
        lambda group: group.recv([], 0, 0),
        lambda group: group.reduce_scatter([], []),
        lambda group: group.reduce_scatter_tensor_coalesced([], []),
    ],
)
def test_the_base_refuses_what_a_subclass_does_not_bring(operation) -> None:
    with pytest.raises(NotImplementedError):
        operation(ProcessGroup())


# ---------------------------------------------------------------------- making one


def test_before_the_first_configure_there_is_no_parent() -> None:
    group = ProcessGroupGloo(SECOND)
    with pytest.raises(AssertionError, match="call configure first"):
        group.allreduce([torch.ones(1)], ReduceOp.SUM)
    with pytest.raises(AssertionError):
        _ = group.parent
    assert group.generation is None
    assert group.errored() is None
    group.abort()
    group.shutdown()


def test_shutdown_can_be_called_again_and_configure_begins_anew(alone, store) -> None:
    alone.shutdown()
    alone.shutdown()
    assert alone.errored() is None
    alone.configure(f"localhost:{store.port}/again", "me", 0, 1)
    alone.allreduce([torch.ones(1)], ReduceOp.SUM).wait()


def test_a_group_leaves_no_keys_in_the_store(store) -> None:
    before = store.num_keys()
    group = ProcessGroupGloo(LONG)
    for quorum in range(3):
        group.configure(f"localhost:{store.port}/quorum/{quorum}", "me", 0, 1)
    assert store.num_keys() == before


def _meet(rank: Rank) -> None:
    rank.configure()
    rank.tell("stands")
    rank.listen()
    rank.group.allreduce([torch.ones(1)], ReduceOp.SUM).wait()
    client = create_store_client(f"{rank.store}/any", rank.timeout)
    client.set("mine", "alone")
    rank.tell((client.get("mine"), client.check(["member/0"]), client.num_keys()))


def test_the_last_of_several_members_deletes_the_keys() -> None:
    with ranks(3, _meet) as world:
        world.hear_all()
        world.tell("look")
        for mine, member, keys in world.hear_all():
            assert mine == b"alone"
            assert not member
            assert keys <= 2  # what the test wrote, and the store's own


def test_members_that_were_told_of_different_sizes_say_so() -> None:
    # Rank 0 was told of two members, rank 1 of three; a third rank makes rank 1's count whole.
    with ranks(3, _configure_sizes) as world:
        messages = [world.hear(0), world.hear(1)]
        assert all("was told of" in message for message in messages)


def _configure_sizes(rank: Rank) -> None:
    with pytest.raises(MismatchError) as caught:
        rank.configure(world_size=2 if rank.rank == 0 else 3, prefix="same")
    rank.tell(str(caught.value))


@pytest.mark.parametrize("rank, world_size", [(1, 1), (-1, 2), (0, 0)])
def test_a_rank_that_cannot_be_is_refused(store, rank: int, world_size: int) -> None:
    with pytest.raises(SettingsError, match=f"rank={rank}: .*at least 0 and below {world_size}"):
        ProcessGroupGloo(LONG).configure(f"localhost:{store.port}/x", "me", rank, world_size)


def test_a_timeout_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="no timeout"):
        ProcessGroupGloo(timedelta(0))


@pytest.mark.parametrize("address", ["localhost", "localhost:80", "localhost/x", ":80/x", "a:b/x"])
def test_a_store_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match="host:port/prefix"):
        create_store_client(address, SECOND)


def test_a_store_that_is_gone_is_an_error_at_once() -> None:
    with socket.socket() as closed:
        closed.bind(("localhost", 0))
        port = closed.getsockname()[1]
    began = time.perf_counter()
    with pytest.raises(CollectiveError, match=f"localhost:{port}/x cannot be reached"):
        create_store_client(f"localhost:{port}/x", timedelta(seconds=60))
    assert time.perf_counter() - began < 5.0


def test_a_store_that_died_and_came_back_on_its_port_is_connected_to_anew() -> None:
    first = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = first.port
    create_store_client(f"localhost:{port}/x", LONG).set("key", "first")
    del first
    second = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    create_store_client(f"localhost:{port}/x", LONG).set("key", "second")
    assert PrefixStore("x", second).get("key") == b"second"


# ---------------------------------------------------------------------- network interfaces


def _member(rank: int, network: str, host: str) -> Member:
    return Member(rank, 2, f"r{rank}", f"host{rank}", network, (host, 4000 + rank))


def test_a_loopback_address_between_hosts_names_the_remedy() -> None:
    far = [_member(0, "one", "10.0.0.1"), _member(1, "two", "127.0.0.1")]
    with pytest.raises(SettingsError, match=r"rank 1 .* on host1 set GLOO_SOCKET_IFNAME"):
        _check(far, Seat(0, 2, "r0"), "store:1/x")
    _check([replace(member, network="one") for member in far], Seat(0, 2, "r0"), "store:1/x")


@pytest.mark.parametrize("interface", ["nowhere0", "one0,two0"])
def test_an_interface_that_cannot_be_taken_names_the_remedy(store, monkeypatch, interface) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    with pytest.raises(SettingsError, match=f"GLOO_SOCKET_IFNAME.*{interface}|{interface}.*GLOO"):
        ProcessGroupGloo(LONG).configure(f"localhost:{store.port}/x", "me", 0, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback interface has another name")
def test_an_interface_that_is_named_is_taken(store, monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    group = ProcessGroupGloo(LONG)
    group.configure(f"localhost:{store.port}/x", "me", 0, 1)
    assert group.generation.members[0].listen[0] == "127.0.0.1"


def test_a_process_without_descriptors_says_so(monkeypatch) -> None:
    """Not that an interface should be named."""
    gc.collect()  # what waits for it may hold descriptors, and would give them back in the middle
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, before[1]))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(CollectiveError, match=r"all of its .* descriptors open.*ulimit -n"):
            gloo._open_device()
        with pytest.raises(CollectiveError, match=r"all of its .* descriptors open"):
            sockets.listening(gloo._open_device)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    gloo._open_device()


# ---------------------------------------------------------------------- torch


def _register(rank: Rank) -> None:
    host, port = rank.store.split(":")
    dist.init_process_group(
        "gloo",
        store=TCPStore(host, int(port), is_master=False),
        rank=rank.rank,
        world_size=rank.world_size,
    )
    group = ProcessGroupDummy()
    with pytest.raises(PhaseError):
        _ = group.group_name
    if rank.rank == 1:
        known = group.register("known")
        assert dist.get_world_size(known) == 1
        tensor = torch.ones(2)
        dist.all_reduce(tensor, group=known)
        assert group.wait_count + group.get_future_count >= 0
        assert group.group_name
        with pytest.raises(PhaseError, match="already"):
            group.register("again")
        group.unregister()
        with pytest.raises(PhaseError, match="not registered"):
            group.unregister()
        group.register("known once more")
        group.unregister()
    dist.barrier()
    dist.destroy_process_group()
    rank.tell("done")


def test_torch_knows_a_group_between_register_and_unregister() -> None:
    with ranks(2, _register) as world:
        assert world.hear_all(1, 0) == ["done", "done"]
