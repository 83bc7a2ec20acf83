"""Process groups around others, the dummy, and both beside torch's own machinery."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed import ReduceOp
from torch.distributed.distributed_c10d import (
    AllreduceOptions,
)
from torch.futures import Future

from torchft.errors import SettingsError
from torchft.process_group import (
    ErrorSwallowingProcessGroupWrapper,
    FakeProcessGroupWrapper,
    ManagedProcessGroup,
    ProcessGroupDummy,
    ProcessGroupWrapper,
)
from torchft.work import _DummyWork


class _Broken(ProcessGroupDummy):
    """All-reduces fail: at once, or when their work is waited for."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.calls = 0
        self._at_once = at_once

    def allreduce(self, tensors, opts=None):
        self.calls += 1
        error = RuntimeError("a peer died")
        if self._at_once:
            raise error
        work = _DummyWork(tensors)
        work._future = Future()
        work._future.set_exception(error)
        work.wait = lambda timeout=None: work._future.wait()
        return work


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("by_future", [True, False])
def test_an_error_is_swallowed_until_the_next_configure(at_once: bool, by_future: bool) -> None:
    inner = _Broken(at_once)
    group = ErrorSwallowingProcessGroupWrapper(inner)
    tensor = torch.ones(2)
    work = group.allreduce([tensor], ReduceOp.SUM)
    if by_future:
        assert work.get_future().wait() == [tensor]
    else:
        assert work.wait()
    assert str(group.error()) == "a peer died"
    assert group.errored() is group.error()
    assert group.allreduce([tensor], ReduceOp.SUM).wait()
    assert inner.calls == 1
    group.configure("", "", 0, 1)
    assert group.error() is None
    group.allreduce([tensor], ReduceOp.SUM)
    assert inner.calls == 2


def test_the_first_error_that_is_reported_stays() -> None:
    group = ErrorSwallowingProcessGroupWrapper(ProcessGroupDummy())
    first = RuntimeError("first")
    group.report_error(first)
    group.report_error(RuntimeError("second"))
    assert group.error() is first


def test_a_fake_error_strikes_the_next_allreduce_only() -> None:
    group = FakeProcessGroupWrapper(ProcessGroupDummy())
    tensor = torch.ones(2)
    group.report_future_error(RuntimeError("on purpose"))
    work = group.allreduce([tensor], ReduceOp.SUM)
    with pytest.raises(RuntimeError, match="on purpose"):
        work.wait()
    with pytest.raises(RuntimeError, match="on purpose"):
        work.get_future().wait()
    assert group.allreduce([tensor], ReduceOp.SUM).wait()


def test_a_wrapper_passes_everything_on() -> None:
    inner = ProcessGroupDummy()
    group = ProcessGroupWrapper(pg=inner)
    group.configure("", "", 0, 1)
    assert inner.configure_count == 1
    assert group.parent is inner
    assert group.size() == 1
    assert group.getBackendName() == "torchft-dummy"
    out = torch.zeros(2)
    assert group.allgather([[out]], [torch.ones(2)]).wait()
    assert out.tolist() == [1.0, 1.0]
    assert inner.wait_count == 1


class _Manager:
    def __init__(self) -> None:
        self.process_group = ProcessGroupDummy()
        self.asked = []

    def allreduce(self, tensor, *, reduce_op):
        self.asked.append((tensor, reduce_op))
        return _DummyWork(tensor)

    def errored(self):
        return None

    def num_participants(self) -> int:
        return 5


def test_a_wrapper_says_what_it_wraps() -> None:
    wrapper = ProcessGroupWrapper(pg=ProcessGroupDummy(0, 1))
    assert repr(wrapper) == "ProcessGroupWrapper(pg=ProcessGroupDummy())"


def test_a_managed_group_all_reduces_through_its_manager() -> None:
    manager = _Manager()
    group = ManagedProcessGroup(manager)
    tensor = torch.ones(2)
    assert group.allreduce([tensor], ReduceOp.AVG).wait()
    opts = AllreduceOptions()
    opts.reduceOp = ReduceOp.SUM
    group.allreduce([tensor], opts)
    assert manager.asked[0] == (tensor, ReduceOp.AVG)
    assert manager.asked[1][1] == ReduceOp.SUM
    assert group.size() == 5
    with pytest.raises(SettingsError, match="one tensor, not 2"):
        group.allreduce([tensor, tensor], ReduceOp.SUM)
    group.barrier().wait()
    assert manager.process_group.wait_count == 1
    with pytest.raises(NotImplementedError, match="its manager configures it"):
        group.configure("", "", 0, 1)


def test_a_dummy_copies_its_inputs_and_counts() -> None:
    group = ProcessGroupDummy()
    one, other = torch.ones(2), torch.zeros(2)
    group.alltoall_base(other, one, [], []).wait()
    assert other.tolist() == [1.0, 1.0]
    group.reduce_scatter([other], [[one * 2]]).get_future().wait()
    assert other.tolist() == [2.0, 2.0]
    assert (group.wait_count, group.get_future_count) == (1, 1)
    with pytest.raises(SettingsError):
        ProcessGroupDummy(1, 2)


# ---------------------------------------------------------------------- torch


def test_torchs_ddp_works_over_a_dummy() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(3, 2)
    model = nn.parallel.DistributedDataParallel(
        plain, process_group=ProcessGroupDummy(), find_unused_parameters=True
    )
    seen = []

    def hook(state, bucket):
        seen.append(bucket.buffer().numel())
        done: Future[torch.Tensor] = Future()
        done.set_result(bucket.buffer() * 2)
        return done

    model.register_comm_hook(None, hook)
    inputs = torch.ones(4, 3)
    model(inputs).sum().backward()
    twice = plain.weight.grad.clone()
    plain.weight.grad = plain.bias.grad = None
    plain(inputs).sum().backward()
    assert torch.equal(twice, plain.weight.grad * 2)
    assert seen == [8]
