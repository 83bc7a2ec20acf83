"""Process groups for devices, as far as a machine without one can tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.steps import lone_step
from torch._C._distributed_c10d import Backend
from torch.distributed import ReduceOp
from torch.distributed.distributed_c10d import (
    AllreduceCoalescedOptions,
    ReduceScatterOptions,
)

import torchft
from torchft.devices import is_lost
from torchft.errors import (
    CollectiveError,
    IntegerAverageError,
    MissingDeviceError,
    NotConfiguredError,
    SharedDeviceError,
    UnsupportedError,
)
from torchft.manager import collectives
from torchft.process_group import (
    ErrorSwallowingProcessGroupWrapper,
    FakeProcessGroupWrapper,
    ManagedProcessGroup,
    ProcessGroup,
    ProcessGroupBabyNCCL,
    ProcessGroupBabyXCCL,
    ProcessGroupDummy,
    ProcessGroupGloo,
    ProcessGroupNCCL,
    ProcessGroupWrapper,
    ProcessGroupXCCL,
)
from torchft.process_group.accelerator import Kind
from torchft.process_group.generation import _check_average
from torchft.process_group.rendezvous import Member, Seat, _check_devices


@pytest.mark.parametrize("name", ["NCCL", "XCCL", "BabyNCCL", "BabyXCCL", "Gloo"])
def test_every_kind_is_imported_from_the_package_on_every_machine(name: str) -> None:
    assert issubclass(getattr(torchft, f"ProcessGroup{name}"), ProcessGroup)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    "kind", [ProcessGroupNCCL, ProcessGroupXCCL, ProcessGroupBabyNCCL, ProcessGroupBabyXCCL]
)
def test_a_kind_that_cannot_work_here_names_the_cause_and_what_to_use(kind: Any) -> None:
    with pytest.raises(MissingDeviceError, match=r"needs .CCL and a .*: use ProcessGroupGloo"):
        kind()


def test_a_torch_without_the_backend_is_told_from_a_machine_without_the_device() -> None:
    absent = Kind("NCCL", "cpu", lambda: False, lambda seats: None)  # type: ignore
    with pytest.raises(MissingDeviceError, match="is built without NCCL"):
        absent.check("ProcessGroupNCCL")
    Kind("NCCL", "cpu", lambda: True, lambda seats: None).check("ProcessGroupNCCL")  # type: ignore


def _member(rank: int, device: str | None) -> Member:
    return Member.here(Seat(rank, 3, f"replica_{rank}"), None, device)


def test_of_two_groups_on_one_gpu_the_later_rank_leaves_and_the_others_try_again() -> None:
    members = [_member(0, "GPU-a"), _member(1, "GPU-b"), _member(2, "GPU-a")]
    with pytest.raises(SharedDeviceError, match=r"rank 2 .* same device as rank 0 .*Gloo"):
        _check_devices(members, members[2])
    for other in members[:2]:
        with pytest.raises(CollectiveError, match=r"rank 2 .* same device as rank 0"):
            _check_devices(members, other)
    _check_devices(members[:2], members[0])
    _check_devices([_member(0, None), _member(1, None)], _member(0, None))


@pytest.mark.parametrize("options", [AllreduceCoalescedOptions, ReduceScatterOptions, None])
def test_an_average_of_integers_is_refused(options: Any) -> None:
    opts = ReduceOp.AVG
    if options is not None:
        opts = options()
        opts.reduceOp = ReduceOp.AVG
    with pytest.raises(IntegerAverageError, match=r"AVG of torch\.int32: .* use SUM and divide"):
        _check_average([torch.ones(2, dtype=torch.int32)], opts)
    _check_average([torch.ones(2)], opts)
    _check_average([torch.ones(2, dtype=torch.int32)], ReduceOp.SUM)
    assert issubclass(IntegerAverageError, ValueError)  # what torchft's users catch


ONE = torch.ones(1)
CALLS: dict[str, Any] = {
    "allreduce": lambda group: group.allreduce([ONE], ReduceOp.SUM),
    "allreduce_coalesced": lambda group: group.allreduce_coalesced([ONE]),
    "allgather": lambda group: group.allgather([[ONE]], [ONE]),
    "allgather_into_tensor_coalesced": lambda group: group.allgather_into_tensor_coalesced(
        [ONE], [ONE]
    ),
    "alltoall_base": lambda group: group.alltoall_base(ONE, ONE, [], []),
    "barrier": lambda group: group.barrier(),
    "broadcast": lambda group: group.broadcast([ONE]),
    "send": lambda group: group.send([ONE], 0, 0),
    "recv": lambda group: group.recv([ONE], 0, 0),
    "reduce_scatter": lambda group: group.reduce_scatter([ONE], [[ONE]]),
    "reduce_scatter_tensor_coalesced": lambda group: group.reduce_scatter_tensor_coalesced(
        [ONE], [ONE]
    ),
}
"""Each collective by name, as a call of it."""


def _kinds() -> dict[str, ProcessGroup]:
    inner = ProcessGroupGloo()
    manager: Any = SimpleNamespace(process_group=inner)
    return {
        "gloo": inner,
        "fake": FakeProcessGroupWrapper(inner),
        "swallowing": ErrorSwallowingProcessGroupWrapper(inner),
        "managed": ManagedProcessGroup(manager),
        "vendor": ProcessGroupWrapper(),
    }


@pytest.mark.parametrize("kind", _kinds())
@pytest.mark.parametrize("name", CALLS)
def test_a_collective_before_configure_is_an_error_of_its_own(kind: str, name: str) -> None:
    group = _kinds()[kind]
    if name == "allreduce" and kind == "swallowing":
        assert CALLS[name](group).wait()
        assert isinstance(group.errored(), NotConfiguredError)
    elif name != "allreduce" or kind != "managed":  # the manager's own, which waits for a quorum
        with pytest.raises(NotConfiguredError, match="call configure first"):
            CALLS[name](group)
    assert issubclass(NotConfiguredError, AssertionError)  # what torchft's users catch


def test_an_operation_that_a_kind_lacks_says_which_and_what_to_use() -> None:
    with pytest.raises(UnsupportedError, match=r"does not support barrier: .*ProcessGroupGloo"):
        ProcessGroup().barrier()


class _Toy(Backend):
    """Torch's own base, which has no operation."""

    def getBackendName(self) -> str:
        return "toy"


def test_an_operation_that_a_vendors_backend_lacks_says_which_and_what_to_use() -> None:
    inner: Any = dist.ProcessGroup(dist.HashStore(), 0, 1)
    custom = dist.ProcessGroup.BackendType.CUSTOM
    inner._set_default_backend(custom)
    inner._register_backend(torch.device("cpu"), custom, _Toy(0, 1))
    group = ProcessGroupWrapper(pg=inner)
    for name, start in CALLS.items():
        with pytest.raises(UnsupportedError, match=rf"does not support {name}: .*ProcessGroupGloo"):
            start(group)


class _Vendor(ProcessGroupWrapper):
    """Overrides every hook, around a group that is there already."""

    def __init__(self) -> None:
        super().__init__(pg=ProcessGroupDummy())
        self.seen: list[Any] = []

    def _opts_hook(self, opts: Any) -> Any:
        self.seen.append(("opts", opts))
        return opts

    @contextmanager
    def _run_context(self) -> Iterator[None]:
        self.seen.append("entered")
        yield
        self.seen.append("left")

    def _wrap_work(self, work: Any, opts: Any) -> Any:
        self.seen.append(("work", opts))
        return work


@pytest.mark.parametrize("by_name", [True, False])
def test_the_hooks_of_a_kind_see_each_operation_in_order(by_name: bool) -> None:
    group, tensor = _Vendor(), torch.ones(2)
    if by_name:
        group.allreduce([tensor], opts=ReduceOp.SUM)
    else:
        group.allreduce([tensor], ReduceOp.SUM)
    assert group.seen == [
        ("opts", ReduceOp.SUM),
        "entered",
        "left",
        ("work", ReduceOp.SUM),
    ]
    group.seen.clear()
    group.send([tensor], 0, 7)  # it has no options
    assert group.seen == ["entered", "left", ("work", None)]


def test_a_device_that_failed_is_told_from_memory_that_ran_out() -> None:
    assert is_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    outer = CollectiveError("the all-reduce of (3,) failed")
    outer.__cause__ = RuntimeError("CUDA error: unspecified launch failure")
    assert is_lost(outer)
    assert not is_lost(torch.OutOfMemoryError("CUDA error: out of memory"))
    assert not is_lost(RuntimeError("CUDA error: out of memory"))  # of pinned memory
    assert not is_lost(RuntimeError("Connection closed by peer"))
    assert not is_lost(None)


def test_a_device_that_fails_while_the_vote_waits_for_it_is_the_steps_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    step: Any = lone_step()
    step.known_plan = SimpleNamespace(anyone_heals=False)
    step.finish_forming()
    monkeypatch.setattr(collectives, "finish_current_stream", fails)
    collectives.finish(step, timedelta(seconds=1))
    assert is_lost(step.error.original_exception)
