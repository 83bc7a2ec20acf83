"""An independent gRPC client drives both servers: the wire is what `proto/` says and no more."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from helpers.coordination import ask, group, lighthouse, seconds
from helpers.stubs import Stubs

from torchft.coordination import (
    LighthouseClient,
    LighthouseServer,
    ManagerClient,
    ManagerServer,
)

LIMIT = 20.0


@pytest.fixture
def server() -> Iterator[LighthouseServer]:
    with lighthouse(1) as running:
        yield running


@pytest.fixture
def manager(server: LighthouseServer) -> Iterator[ManagerServer]:
    with group(server.address(), "a:1", world_size=2) as running:
        yield running


def channel(server: LighthouseServer | ManagerServer) -> grpc.Channel:
    return grpc.insecure_channel(server.address().removeprefix("http://"))


def at_lighthouse(stubs: Stubs, server: LighthouseServer) -> Any:
    return stubs.services.LighthouseServiceStub(channel(server))


def at_manager(stubs: Stubs, server: ManagerServer) -> Any:
    return stubs.services.ManagerServiceStub(channel(server))


def requester(stubs: Stubs, **fields: object) -> Any:
    member = stubs.messages.QuorumMember(**fields)
    return stubs.messages.LighthouseQuorumRequest(requester=member)


def refused(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value


def test_a_quorum_carries_every_field_of_its_member(stubs: Stubs, server: LighthouseServer) -> None:
    sent = {
        "replica_id": "a:1",
        "address": "http://a:1",
        "store_address": "a:2",
        "step": 7,
        "world_size": 8,
        "shrink_only": False,
        "data": '{"x": 1}',
        "commit_failures": 2,
        "reconfigure_handles": ["", '{"id": "0a"}'],
    }
    quorum = at_lighthouse(stubs, server).Quorum(requester(stubs, **sent), timeout=LIMIT).quorum
    assert quorum.quorum_id > 1_600_000_000_000, "milliseconds since 1970"
    assert quorum.created.seconds > 1_600_000_000
    (member,) = quorum.participants
    assert {name: getattr(member, name) for name in sent} == sent
    assert not member.HasField("init_sync")


def test_members_of_both_clients_meet_sorted_by_id(stubs: Stubs, server: LighthouseServer) -> None:
    with lighthouse(2) as two, ThreadPoolExecutor(1) as threads:
        client = LighthouseClient(two.address(), connect_timeout=seconds(LIMIT))
        ours = threads.submit(client.quorum, "b:1", timeout=seconds(LIMIT), step=3)
        theirs = at_lighthouse(stubs, two).Quorum(
            requester(stubs, replica_id="a:1", step=3), timeout=LIMIT
        )
        assert [m.replica_id for m in theirs.quorum.participants] == ["a:1", "b:1"]
        assert [m.replica_id for m in ours.result().participants] == ["a:1", "b:1"]


def test_a_heartbeat_is_answered_with_an_empty_message(
    stubs: Stubs, server: LighthouseServer
) -> None:
    beat = stubs.messages.LighthouseHeartbeatRequest(replica_id="a:1")
    reply = at_lighthouse(stubs, server).Heartbeat(beat, timeout=LIMIT)
    assert reply.SerializeToString() == b""


def test_a_deadline_is_answered_with_the_reason(stubs: Stubs) -> None:
    with lighthouse(2) as server:
        ask = requester(stubs, replica_id="a:1")
        error = refused(lambda: at_lighthouse(stubs, server).Quorum(ask, timeout=1))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "1 of at least 2 replicas ask" in error.details()


def test_a_request_without_a_member_is_refused(stubs: Stubs, server: LighthouseServer) -> None:
    empty = stubs.messages.LighthouseQuorumRequest()
    error = refused(lambda: at_lighthouse(stubs, server).Quorum(empty, timeout=LIMIT))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_later_wire_version_is_refused_in_words(stubs: Stubs, server: LighthouseServer) -> None:
    beat = stubs.messages.LighthouseHeartbeatRequest(replica_id="a:1")
    service = at_lighthouse(stubs, server)
    service.Heartbeat(beat, timeout=LIMIT, metadata=[("torchft-wire", "1.9")])
    error = refused(
        lambda: service.Heartbeat(beat, timeout=LIMIT, metadata=[("torchft-wire", "2")])
    )
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "wire version 2, this side speaks 1" in error.details()


def test_every_reply_states_the_wire_version(stubs: Stubs, server: LighthouseServer) -> None:
    beat = stubs.messages.LighthouseHeartbeatRequest(replica_id="a:1")
    _, call = at_lighthouse(stubs, server).Heartbeat.with_call(beat, timeout=LIMIT)
    assert ("torchft-wire", "1") in [tuple(pair) for pair in call.initial_metadata()]


def test_an_unknown_method_is_unimplemented(stubs: Stubs, server: LighthouseServer) -> None:
    with channel(server) as opened:
        call = opened.unary_unary("/torchft.CoordinatorService/Info")
        assert refused(lambda: call(b"", timeout=LIMIT)).code() == grpc.StatusCode.UNIMPLEMENTED


def quorum_of(stubs: Stubs, rank: int, **fields: object) -> Any:
    return stubs.messages.ManagerQuorumRequest(group_rank=rank, **fields)


def both(call: Any) -> list[Any]:
    """`call(rank)` for both ranks of the group, side by side."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(call, [0, 1]))


def test_a_group_of_two_ranks_gets_its_assignment(stubs: Stubs, manager: ManagerServer) -> None:
    service = at_manager(stubs, manager)

    def ask(rank: int) -> Any:
        request = quorum_of(stubs, rank, step=5, checkpoint_metadata=f"m{rank}", commit_failures=1)
        return service.Quorum(request, timeout=LIMIT)

    for told in both(ask):
        assert (told.replica_rank, told.replica_world_size) == (0, 1)
        assert (told.max_step, told.max_replica_rank, told.max_world_size) == (5, 0, 1)
        assert (told.heal, told.recover_src_manager_address) == (False, "")
        assert not told.HasField("recover_src_replica_rank")
        assert told.store_address == "store-of-a:1"
        assert told.commit_failures == 1
        assert list(told.replica_ids) == ["a:1"]
    wanted = stubs.messages.CheckpointMetadataRequest(rank=1)
    assert service.CheckpointMetadata(wanted, timeout=LIMIT).checkpoint_metadata == "m1"


def test_a_rank_is_told_the_handles_of_its_own_group_rank(stubs: Stubs) -> None:
    with lighthouse(2) as server, group(server.address(), "a:1", world_size=2) as manager:
        service = at_manager(stubs, manager)
        peer = requester(stubs, replica_id="b:1", reconfigure_handles=["gloo:b0", "b1", "b2"])
        with ThreadPoolExecutor(1) as threads:
            theirs = threads.submit(at_lighthouse(stubs, server).Quorum, peer, timeout=LIMIT)
            told = both(
                lambda rank: service.Quorum(
                    quorum_of(stubs, rank, reconfigure_handle="a1" * rank), timeout=LIMIT
                )
            )
            members = theirs.result().quorum.participants
    assert [list(t.reconfigure_handles) for t in told] == [["", "gloo:b0"], ["a1", "b1"]]
    assert [list(m.reconfigure_handles) for m in members] == [["", "a1"], ["gloo:b0", "b1", "b2"]]


def test_a_group_of_an_older_manager_is_held_back_and_told_why(stubs: Stubs) -> None:
    with lighthouse(1) as server, group(server.address(), "ours:1") as manager:
        client = ManagerClient(manager.address(), connect_timeout=seconds(LIMIT))
        first = ask(client)
        older = requester(stubs, replica_id="older:1", address="http://older:1", step=9)
        error = refused(lambda: at_lighthouse(stubs, server).Quorum(older, timeout=0.5))
        again = ask(client, step=1)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "older:1 runs PyTorch's torchft up to 0.2, and the job runs this torchft: ours:1" in (
        error.details()
    )
    assert again.quorum_id == first.quorum_id
    assert again.replica_ids == ["ours:1"]


def test_an_older_group_begins_when_too_few_of_the_newer_are_left(stubs: Stubs) -> None:
    with lighthouse(1, heartbeat_timeout_ms=400) as server, ThreadPoolExecutor(1) as threads:
        service = at_lighthouse(stubs, server)
        newer = requester(
            stubs, replica_id="newer:1", address="http://n:1", reconfigure_handles=["h"]
        )
        older = requester(stubs, replica_id="older:1", address="http://older:1")
        first = service.Quorum(newer, timeout=LIMIT).quorum  # and is not heard again
        waiting = threads.submit(service.Quorum, older, timeout=LIMIT)
        beat = stubs.messages.LighthouseHeartbeatRequest(replica_id="older:1")
        while not waiting.done():
            service.Heartbeat(beat, timeout=LIMIT)
        second = waiting.result().quorum
    assert [m.replica_id for m in second.participants] == ["older:1"]
    assert second.quorum_id > first.quorum_id


def test_other_handles_of_the_same_members_keep_the_quorum_id(
    stubs: Stubs, server: LighthouseServer
) -> None:
    service = at_lighthouse(stubs, server)
    first, second = (
        service.Quorum(
            requester(stubs, replica_id="a:1", reconfigure_handles=[handle]), timeout=LIMIT
        ).quorum
        for handle in ("x", "y")
    )
    assert first.quorum_id == second.quorum_id
    assert list(second.participants[0].reconfigure_handles) == ["y"]


def test_the_slowest_rank_decides_the_groups_step(stubs: Stubs) -> None:
    """The last caller's step does not stand for the whole group: all its ranks heal."""
    with lighthouse(2) as server, group(server.address(), "a:1", world_size=2) as manager:
        service = at_manager(stubs, manager)
        peer = LighthouseClient(server.address(), connect_timeout=seconds(LIMIT))
        with ThreadPoolExecutor(1) as threads:
            threads.submit(peer.quorum, "b:1", timeout=seconds(LIMIT), step=9)
            told = both(lambda r: service.Quorum(quorum_of(stubs, r, step=8 + r), timeout=LIMIT))
        assert [(t.heal, t.max_step, t.recover_src_replica_rank) for t in told] == [
            (True, 9, 1)
        ] * 2


def test_a_manager_quorum_without_a_deadline_is_refused(
    stubs: Stubs, manager: ManagerServer
) -> None:
    error = refused(lambda: at_manager(stubs, manager).Quorum(quorum_of(stubs, 0)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "grpc-timeout" in error.details()


def test_a_missing_rank_is_named_at_the_deadline(stubs: Stubs, manager: ManagerServer) -> None:
    error = refused(lambda: at_manager(stubs, manager).Quorum(quorum_of(stubs, 1), timeout=0.5))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "group ranks [0]" in error.details()


@pytest.mark.parametrize("yes", [(True, True), (True, False), (False, True), (False, False)])
def test_a_vote_is_the_and_over_the_ranks(
    stubs: Stubs, manager: ManagerServer, yes: tuple[bool, bool]
) -> None:
    service = at_manager(stubs, manager)

    def vote(rank: int) -> bool:
        ballot = stubs.messages.ShouldCommitRequest(
            group_rank=rank, step=3, should_commit=yes[rank]
        )
        return bool(service.ShouldCommit(ballot, timeout=LIMIT).should_commit)

    assert both(vote) == [all(yes)] * 2


def test_a_vote_that_timed_out_does_not_count_in_the_next_round(
    stubs: Stubs, manager: ManagerServer
) -> None:
    service = at_manager(stubs, manager)

    def ballot(rank: int, step: int, *, commit: bool) -> Any:
        return stubs.messages.ShouldCommitRequest(group_rank=rank, step=step, should_commit=commit)

    alone = ballot(0, 1, commit=False)
    error = refused(lambda: service.ShouldCommit(alone, timeout=0.5))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    both(lambda r: service.Quorum(quorum_of(stubs, r, step=2), timeout=LIMIT))
    votes = both(lambda r: service.ShouldCommit(ballot(r, 2, commit=True), timeout=LIMIT))
    assert [v.should_commit for v in votes] == [True, True]


def test_metadata_of_a_rank_that_has_not_asked_is_not_found(
    stubs: Stubs, manager: ManagerServer
) -> None:
    wanted = stubs.messages.CheckpointMetadataRequest(rank=1)
    error = refused(lambda: at_manager(stubs, manager).CheckpointMetadata(wanted, timeout=LIMIT))
    assert error.code() == grpc.StatusCode.NOT_FOUND
