"""Process groups for devices, as far as a machine without one can tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.distributed import ReduceOp
from torch.distributed.distributed_c10d import AllreduceCoalescedOptions, ReduceScatterOptions

import torchft
from torchft.devices import is_lost
from torchft.errors import (
    CollectiveError,
    MissingDeviceError,
    NotConfiguredError,
    SettingsError,
    SharedDeviceError,
    UnsupportedError,
)
from torchft.process_group import (
    ProcessGroup,
    ProcessGroupBabyNCCL,
    ProcessGroupBabyXCCL,
    ProcessGroupDummy,
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
    with pytest.raises(SettingsError, match=r"AVG of torch\.int32: .* use SUM and divide"):
        _check_average([torch.ones(2, dtype=torch.int32)], opts)
    _check_average([torch.ones(2)], opts)
    _check_average([torch.ones(2, dtype=torch.int32)], ReduceOp.SUM)


def test_a_collective_before_configure_is_an_error_of_its_own() -> None:
    group = ProcessGroupWrapper()
    with pytest.raises(NotConfiguredError, match="call configure first"):
        group.allreduce([torch.ones(1)], ReduceOp.SUM)
    assert issubclass(NotConfiguredError, AssertionError)  # what torchft's users catch


def test_an_operation_that_a_kind_lacks_says_which_and_what_to_use() -> None:
    with pytest.raises(UnsupportedError, match=r"does not support barrier: .*ProcessGroupGloo"):
        ProcessGroup().barrier()


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
    assert not is_lost(RuntimeError("Connection closed by peer"))
    assert not is_lost(None)
