"""Process groups in child processes: numbers, deaths, hangs, and what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
from helpers.commands import is_there
from helpers.members import Pair
from helpers.threads import Group, groups
from helpers.waiting import until
from torch import nn
from torch.distributed import ReduceOp, TCPStore

from torchft import DistributedDataParallel, Optimizer
from torchft.errors import ChildLostError, CollectiveError, NotConfiguredError, SettingsError
from torchft.process_group import (
    ManagedProcessGroup,
    ProcessGroupBabyGloo,
    ProcessGroupBabyNCCL,
    ProcessGroupBabyXCCL,
    ProcessGroupWrapper,
)

LONG = timedelta(seconds=60)
SHORT = timedelta(seconds=1)
MOST = 16
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: never run yet")


Children = Pair[ProcessGroupBabyGloo]


@pytest.fixture
def pair(baby_pair: Children) -> Children:
    """The two members that all tests share, configured."""
    return baby_pair


def test_tensors_with_gaps_and_of_integers_have_the_result_in_place(pair: Children) -> None:
    strided = [torch.full((4, 2), rank + 1.0)[:, 0] for rank in range(2)]
    whole = [torch.full((4,), rank + 1) for rank in range(2)]
    works: list[Any] = []
    for rank, member in enumerate(pair.members):
        works += [
            member.allreduce([strided[rank]], ReduceOp.MAX),
            member.allreduce([whole[rank]], opts=ReduceOp.SUM),
        ]
    assert all(work.wait(LONG) for work in works)
    assert all(one.tolist() == [2.0] * 4 for one in strided)
    assert all(one.tolist() == [3] * 4 for one in whole)
    assert works[0].get_future().value()[0] is strided[0]
    assert pair.members[0].bytes_sent > 0


def test_a_child_is_kept_through_a_new_quorum(pair: Children) -> None:
    before = [member.child_pid for member in pair.members]
    pending = pair.members[0].allreduce([torch.ones(3)], ReduceOp.SUM)
    pair.configure()
    assert [member.child_pid for member in pair.members] == before
    with pytest.raises(CollectiveError, match="configured anew"):
        pending.wait(LONG)
    assert pair.members[0].errored() is None


def test_a_child_is_killed_in_an_allreduce(pair: Children) -> None:
    survivor, victim = pair.members
    killed = victim.child_pid
    assert killed is not None
    tensor = torch.ones(1 << 20)
    works = [survivor.allreduce([torch.ones(1 << 20)], ReduceOp.SUM), victim.recv([tensor], 0, 1)]
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(CollectiveError, match="Connection"):
        works[0].wait(timedelta(seconds=10))
    with pytest.raises(ChildLostError, match=r"died \(exit status -9\)"):
        works[1].wait(timedelta(seconds=10))
    assert torch.equal(tensor, torch.ones(1 << 20))
    assert isinstance(victim.errored(), ChildLostError)
    with pytest.raises(ChildLostError, match="the next configure uses a new one"):
        victim.barrier()
    pair.configure()
    assert victim.child_pid != killed and not is_there(killed)
    works = [member.allreduce([torch.ones(3)], ReduceOp.SUM) for member in pair.members]
    assert all(work.wait(LONG) for work in works)


def test_a_child_hangs(pair: Children) -> None:
    hung, other = pair.members
    pid = hung.child_pid
    assert pid is not None
    hung.set_timeout(SHORT)
    os.kill(pid, signal.SIGSTOP)
    work = hung.allreduce([torch.ones(3)], ReduceOp.SUM)
    future = work.get_future()
    with pytest.raises(ChildLostError, match="hung: no answer in 1 s, and was killed"):
        work.wait(timedelta(seconds=30))
    with pytest.raises(RuntimeError, match="hung"):
        future.wait()
    assert not is_there(pid)
    hung.set_timeout(LONG)
    pair.configure()
    works = [member.barrier() for member in (hung, other)]
    assert all(work.wait(LONG) for work in works)


def test_one_operation_more_than_is_allowed_waits_for_room(pair: Children) -> None:
    first, second = pair.members
    first.set_timeout(timedelta(seconds=0.3))
    works = [first.recv([torch.empty(1)], 1, tag) for tag in range(MOST)]
    assert first.num_active_work() == MOST
    with pytest.raises(CollectiveError, match=r"16 operations \(max_active_work\)"):
        first.recv([torch.empty(1)], 1, MOST)
    first.abort()
    for work in works:
        with pytest.raises(CollectiveError, match="aborted"):
            work.wait(LONG)
    until(lambda: first.num_active_work() == 0, "the child to let go of what was aborted")
    assert isinstance(first.errored(), CollectiveError)
    first.abort(errored=False)
    with pytest.raises(CollectiveError, match="aborted"):
        first.barrier()
    assert second.errored() is None


def test_nothing_is_left_after_shutdown() -> None:
    shared = os.listdir("/dev/shm")
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    served = len(os.listdir("/proc/self/fd"))
    group = ProcessGroupBabyGloo(60.0)
    with pytest.raises(NotConfiguredError, match="call configure first"):
        group.barrier()
    group.configure(f"localhost:{store.port}/alone", "me", 0, 1)
    pid = group.child_pid
    assert pid is not None
    group.allreduce([torch.ones(1 << 20)], ReduceOp.SUM).wait(LONG)
    assert os.listdir("/dev/shm") == shared
    group.shutdown()
    group.shutdown()
    assert not is_there(pid)
    with pytest.raises(OSError, match="handle is closed"):
        group.barrier()
    until(lambda: len(os.listdir("/proc/self/fd")) <= served, "no descriptor is left", within_s=10)


UNGUARDED = """
import sys
from torchft import ProcessGroupBabyGloo
print("the main module runs", flush=True)
group = ProcessGroupBabyGloo(60.0)
print(group.child_pid, flush=True)
sys.stdin.read()
"""


def test_a_child_of_an_unguarded_script_runs_it_once_and_ends_with_its_parent(tmp_path) -> None:
    script = tmp_path / "train.py"
    script.write_text(UNGUARDED)
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "the main module runs\n"
        child = int(parent.stdout.readline())
        assert is_there(child)
        parent.kill()
        until(lambda: not is_there(child), "the child to end with its parent", within_s=30)
        assert parent.stdout.read() == ""


class _Shared(ProcessGroupWrapper):
    """A group that outlives its manager: the next test uses its child."""

    def shutdown(self) -> None:
        pass


def _train(group: Group, pg: ProcessGroupBabyGloo) -> tuple[list[bool], float]:
    shared = _Shared(pg=pg)
    manager = group.manager(pg=shared, timeout=LONG, quorum_timeout=LONG)
    torch.manual_seed(group.number)
    inner = nn.Linear(3, 1)
    model = DistributedDataParallel(manager, inner)
    manager.set_state_dict_fns(inner.load_state_dict, inner.state_dict)
    optimizer = Optimizer(manager, torch.optim.SGD(inner.parameters(), lr=0.1))
    committed = []
    while manager.current_step() < 3:
        optimizer.zero_grad()
        if manager.current_step() == 1 and all(committed) and group.number == 0:
            manager.wait_quorum()
            pid = pg.child_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        model(torch.ones(2, 3)).sum().backward()
        before = manager.current_step()
        optimizer.step()
        committed.append(manager.current_step() > before)
        assert len(committed) < 10
    assert ManagedProcessGroup(manager).getBackendName().endswith("torchft-baby-gloo")
    return committed, inner.weight.sum().item()


def test_two_groups_train_and_the_step_after_a_childs_death_commits(pair: Children) -> None:
    ends = groups(2, lambda group: _train(group, pair.members[group.number]))
    (committed, weight), (others, same) = ends
    assert committed == others == [True, False, True, True]
    assert weight == same


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("kind", [ProcessGroupBabyNCCL, ProcessGroupBabyXCCL])
def test_a_kind_for_a_device_that_is_not_there_says_what_to_use(kind: Any) -> None:
    with pytest.raises(SettingsError, match="use ProcessGroupGloo"):
        kind(timedelta(seconds=10))


@NO_GPU
def test_nccl_in_a_child_reduces_a_tensor_of_the_gpu() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    group = ProcessGroupBabyNCCL(LONG)
    try:
        group.configure(f"localhost:{store.port}/alone", "me", 0, 1)
        tensor = torch.ones(3, device="cuda")
        group.allreduce([tensor], ReduceOp.SUM).wait(LONG)
        assert tensor.tolist() == [1.0] * 3
    finally:
        group.shutdown()
