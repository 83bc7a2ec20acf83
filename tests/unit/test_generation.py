"""A generation is abandoned at once, stands anew at once, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time

import pytest
import torch
from torch.distributed import ReduceOp

from tests.helpers.ranks import Rank, ranks
from torchft.errors import CollectiveError

ABANDONED_S = 0.1
linux = pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="elsewhere a retired group waits for its deadline"
)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _settle(condition, deadline_s: float = 10.0) -> bool:
    """Whether `condition` comes true; what it waits for runs on another thread."""
    until = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > until:
            return False
        threading.Event().wait(0.005)
    return True


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
    with pytest.raises(RuntimeError):
        work.wait()
    ended_s = time.perf_counter() - began
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
