"""Every collective on every kind of process group, in two members: the right numbers, or an error
that says which kind lacks it and what to use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.members import Pair
from torch import Tensor
from torch.distributed import ReduceOp, Work
from torch.distributed.distributed_c10d import (
    AllreduceCoalescedOptions,
    AllreduceOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)

from torchft.errors import UnsupportedError
from torchft.process_group import (
    ErrorSwallowingProcessGroupWrapper,
    FakeProcessGroupWrapper,
    ManagedProcessGroup,
    ProcessGroup,
    ProcessGroupDummy,
    ProcessGroupGloo,
    ProcessGroupNCCL,
    ProcessGroupXCCL,
)

LONG = timedelta(seconds=30)
Begun = tuple[Work, list[Tensor]]
"""An operation under way, and the tensors that will have its result."""
Call = Callable[[ProcessGroup, int, list[Tensor]], Begun]
"""Begins a collective for a rank, given what each member has."""
Rule = Callable[[int, list[Tensor]], list[Tensor]]
"""What a rank has afterwards, given what each member had."""


def _options(options: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(options, name, value)
    return options


def _sum(all_of: list[Tensor]) -> Tensor:
    return torch.stack(all_of).sum(0)


def _blocks(tensor: Tensor, count: int) -> list[Tensor]:
    return list(tensor.tensor_split(count))


def _allreduce(op: Any) -> Call:
    def begin(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
        mine = have[rank].clone()
        return group.allreduce([mine], op), [mine]

    return begin


def _coalesced(op: Any) -> Call:
    def begin(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
        mine = [have[rank].clone(), have[rank][:1].clone()]
        opts = _options(AllreduceCoalescedOptions(), reduceOp=op)
        return group.allreduce_coalesced(mine, opts), mine

    return begin


def _allgather(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
    rows = [torch.empty_like(one) for one in have]
    return group.allgather([rows], [have[rank]]), rows


def _into_tensors(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
    mine = [have[rank], have[rank][:1]]
    flat = [torch.empty_like(torch.cat([one] * len(have))) for one in mine]
    return group.allgather_into_tensor_coalesced(flat, mine), flat


def _alltoall(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
    mixed = torch.empty_like(have[rank])
    return group.alltoall_base(mixed, have[rank], [], []), [mixed]


def _broadcast(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
    mine = have[rank].clone()
    root = _options(BroadcastOptions(), rootRank=len(have) - 1)
    return group.broadcast([mine], root), [mine]


def _broadcast_one(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
    mine = have[rank].clone()
    return group.broadcast_one(mine, len(have) - 1), [mine]


def _send_and_recv(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
    mine = have[rank].clone()
    if rank == 0:
        return group.send([mine], len(have) - 1, 7), [mine]
    return group.recv([mine], 0, 7), [mine]


def _scatter(op: Any) -> Call:
    def begin(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
        blocks = _blocks(have[rank], len(have))
        mine = torch.empty_like(blocks[0])
        opts = _options(ReduceScatterOptions(), reduceOp=op)
        return group.reduce_scatter([mine], [blocks], opts), [mine]

    return begin


def _scatter_tensors(group: ProcessGroup, rank: int, have: list[Tensor]) -> Begun:
    given = [have[rank], have[rank].view(len(have), -1)]
    mine = [torch.empty_like(one.tensor_split(len(have))[0]) for one in given]
    return group.reduce_scatter_tensor_coalesced(mine, given), mine


COLLECTIVES: dict[str, tuple[Call, Rule]] = {
    "allreduce": (_allreduce(ReduceOp.SUM), lambda rank, have: [_sum(have)]),
    "allreduce by options": (
        _allreduce(_options(AllreduceOptions(), reduceOp=ReduceOp.MAX)),
        lambda rank, have: [torch.stack(have).amax(0)],
    ),
    "allreduce AVG": (_allreduce(ReduceOp.AVG), lambda rank, have: [_sum(have) / len(have)]),
    "allreduce_coalesced": (
        _coalesced(ReduceOp.SUM),
        lambda rank, have: [_sum(have), _sum(have)[:1]],
    ),
    "allgather": (_allgather, lambda rank, have: have),
    "allgather_into_tensor_coalesced": (
        _into_tensors,
        lambda rank, have: [torch.cat(have), torch.cat([one[:1] for one in have])],
    ),
    "alltoall_base": (
        _alltoall,
        lambda rank, have: [torch.cat([_blocks(one, len(have))[rank] for one in have])],
    ),
    "barrier": (lambda group, rank, have: (group.barrier(), []), lambda rank, have: []),
    "broadcast": (_broadcast, lambda rank, have: [have[-1]]),
    "broadcast_one": (_broadcast_one, lambda rank, have: [have[-1]]),
    "send and recv": (_send_and_recv, lambda rank, have: [have[0]]),
    "reduce_scatter": (
        _scatter(ReduceOp.SUM),
        lambda rank, have: [_blocks(_sum(have), len(have))[rank]],
    ),
    "reduce_scatter AVG": (
        _scatter(ReduceOp.AVG),
        lambda rank, have: [_blocks(_sum(have), len(have))[rank] / len(have)],
    ),
    "reduce_scatter_tensor_coalesced": (
        _scatter_tensors,
        lambda rank, have: [
            _blocks(_sum(have), len(have))[rank],
            _sum(have).view(len(have), -1)[rank : rank + 1],
        ],
    ),
}


def _managed(inner: ProcessGroup) -> ProcessGroup:
    def allreduce(tensor: Tensor, *, reduce_op: Any) -> Work:
        return inner.allreduce([tensor], reduce_op)

    manager: Any = SimpleNamespace(process_group=inner, allreduce=allreduce)
    return ManagedProcessGroup(manager)


AROUND: dict[str, Callable[[ProcessGroup], ProcessGroup]] = {
    "gloo": lambda inner: inner,
    "swallowing": ErrorSwallowingProcessGroupWrapper,
    "fake": FakeProcessGroupWrapper,
    "managed": _managed,
}
"""Kinds around gloo, which they share."""


@pytest.fixture(scope="module")
def gloo() -> Iterator[Pair[ProcessGroupGloo]]:
    """Two members over gloo, configured."""
    pair = Pair(lambda: ProcessGroupGloo(LONG))
    pair.configure()
    yield pair
    pair.shutdown()


def _on(device: str) -> int:
    module = torch.get_device_module(device) if hasattr(torch, device) else None
    return module.device_count() if module is not None and module.is_available() else 0


def _each_on_its_own(kind: Any, device: str) -> Pair[Any]:
    numbers = iter(range(2))

    def make() -> ProcessGroup:
        torch.get_device_module(device).set_device(next(numbers))
        return kind(LONG)

    return Pair(make)


def agree(groups: Sequence[ProcessGroup], name: str) -> None:
    """All members run one collective, and each has what it should have."""
    begin, rule = COLLECTIVES[name]
    ranks = range(len(groups))
    have = [torch.arange(4.0) + 10 * rank for rank in ranks]
    placed = [[one.to(groups[rank].device) for one in have] for rank in ranks]
    begun = [begin(groups[rank], rank, placed[rank]) for rank in ranks]
    for rank, (work, results) in enumerate(begun):
        assert work.wait(LONG)
        expected = rule(rank, have)
        assert len(results) == len(expected)
        for result, right in zip(results, expected, strict=True):
            torch.testing.assert_close(result.cpu(), right, rtol=0, atol=0)


@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_over_gloo(gloo: Pair[ProcessGroupGloo], kind: str, name: str) -> None:
    agree([AROUND[kind](member) for member in gloo.members], name)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_in_two_child_processes(baby_pair: Pair[Any], name: str) -> None:
    agree(baby_pair.members, name)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_of_the_dummy_which_is_alone(name: str) -> None:
    agree([ProcessGroupDummy()], name)


@pytest.mark.gpu
@pytest.mark.skipif(_on("cuda") < 2, reason="no two GPUs here: never run")
def test_every_collective_over_nccl() -> None:
    _all_agree(_each_on_its_own(ProcessGroupNCCL, "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(_on("xpu") < 2, reason="no two XPUs here: never run")
def test_every_collective_over_xccl() -> None:
    _all_agree(_each_on_its_own(ProcessGroupXCCL, "xpu"))


def _all_agree(pair: Pair[Any]) -> None:
    pair.configure()
    for name in COLLECTIVES:
        agree(pair.members, name)
    pair.shutdown()


def test_parts_of_different_shapes_are_refused_with_what_to_use(
    gloo: Pair[ProcessGroupGloo], baby_pair: Pair[Any]
) -> None:
    parts = [torch.ones(1), torch.ones(3)]
    for group in (gloo.members[0], baby_pair.members[0]):
        with pytest.raises(UnsupportedError, match=r"does not support reduce_scatter .*: pad them"):
            group.reduce_scatter([torch.ones(1)], [parts]).wait(LONG)
