"""Weights and gradients as flat tensors: any sizes, any mixture of dtypes, sharded or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.peers import Node, Script, World
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_module
from torch.testing import assert_close

from torchft.errors import HealError
from torchft.strategies import DiLoCoRecipe, ModelLocal, Strategy
from torchft.strategies.parts import buckets
from torchft.strategies.parts.backup import Backup
from torchft.strategies.parts.outer import ModelOuter
from torchft.strategies.parts.scratch import Scratch

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
ragged = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=7,
)


def model_of(sizes: list[tuple[list[int], torch.dtype]]) -> nn.ParameterList:
    """Parameters of these shapes and dtypes, all elements different."""
    return nn.ParameterList(
        nn.Parameter(torch.arange(torch.Size(shape).numel()).add(100 * i).view(shape).to(dtype))
        for i, (shape, dtype) in enumerate(sizes)
    )


@given(ragged)
def test_weights_go_out_and_come_back_whole(sizes: list[Any]) -> None:
    model = model_of(sizes)
    before = [p.detach().clone() for p in model]
    local = ModelLocal([model])
    flats = local.weights(local.whole)
    assert len({flat.dtype for flat in flats}) == len(flats)
    assert sum(flat.numel() for flat in flats) == sum(p.numel() for p in model)
    for p in model:
        p.detach().zero_()
    local.set_weights(local.whole, flats)
    assert_close([p.detach() for p in model], before, rtol=0, atol=0)


@given(ragged)
def test_a_delta_is_base_minus_weights(sizes: list[Any]) -> None:
    model = model_of(sizes)
    local = ModelLocal([model])
    base = [flat + 3 for flat in local.weights(local.whole)]
    expected = [b - w for b, w in zip(base, local.weights(local.whole), strict=True)]
    assert_close(local.delta(local.whole, base), expected, rtol=0, atol=0)


@given(ragged, st.data())
def test_some_elements_go_out_and_come_back(sizes: list[Any], data: st.DataObject) -> None:
    local = ModelLocal([model_of(sizes)])
    before = local.weights(local.whole)
    positions = [
        torch.tensor(
            data.draw(st.lists(st.integers(0, f.numel() - 1), unique=True)) if f.numel() else [],
            dtype=torch.int64,
        )
        for f in before
    ]
    some = local.select(local.whole, positions)
    assert_close(some, [f[:, at] for f, at in zip(before, positions, strict=True)], rtol=0, atol=0)
    local.put(local.whole, positions, [s * 0 for s in some])
    for now, was, at in zip(local.weights(local.whole), before, positions, strict=True):
        assert torch.equal(now[0], was[0].index_fill(0, at, 0))


@given(ragged, st.integers(1, 64))
def test_buckets_cover_everything_once_and_none_is_too_large(sizes: list[Any], cap: int) -> None:
    local = ModelLocal([model_of(sizes)])
    flats = local.weights(local.whole)
    cut = buckets.cut(flats, cap)
    assert all(b.numel() * b.element_size() <= max(cap, b.element_size()) for b in cut)
    assert sum(b.numel() for b in cut) == sum(flat.numel() for flat in flats)
    expected = [flat + 1 for flat in flats]
    for b in cut[::2]:
        b.add_(1)  # in place
    elsewhere = [b if i % 2 == 0 else b + 1 for i, b in enumerate(cut)]
    assert_close(buckets.join(elsewhere, flats), expected, rtol=0, atol=0)


def test_averages_of_many_rows_come_back_as_one_and_the_rows_stand() -> None:
    rows = torch.arange(15.0).view(3, 5)
    averages = [bucket.mean(0, keepdim=True) for bucket in buckets.cut([rows], 8)]
    (joined,) = buckets.join(averages, [rows])
    assert joined.tolist() == [[5.0, 6.0, 7.0, 8.0, 9.0]]
    assert torch.equal(rows, torch.arange(15.0).view(3, 5))


def test_a_mixed_model_synchronises_by_diloco() -> None:
    """Two nodes, each dtype averaged in its own."""
    model_of_node = [
        model_of([([3, 2], torch.float32), ([5], torch.bfloat16), ([1], torch.float32)])
        for _ in range(2)
    ]

    def outer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    def story(node: Node) -> list[Tensor]:
        model = model_of_node[node.rank]
        strategy = Strategy([DiLoCoRecipe(outer, 1)], bucket_bytes=8).bind(
            ModelLocal([model]), node
        )
        with torch.no_grad():
            for p in model:
                p.add_(node.rank * 2)
        strategy.after()
        return [p.detach() for p in model]

    start = model_of([([3, 2], torch.float32), ([5], torch.bfloat16), ([1], torch.float32)])
    expected = [(p + 1).detach() for p in start]
    for weights in World(Script(2)).run(story).values():
        assert_close(weights, expected, rtol=0, atol=0)


class TestScratch:
    """What a round fills and gives back."""

    def take(self, scratch: Scratch, size: int) -> Tensor:
        return scratch.take(size, torch.float32, torch.device("cpu"))

    def test_what_came_back_serves_again_also_a_smaller_fragment(self) -> None:
        scratch = Scratch()
        first = self.take(scratch, 8)
        address = first.data_ptr()
        scratch.release([first], reusable=True)
        assert self.take(scratch, 5).data_ptr() == address

    def test_two_at_once_never_share(self) -> None:
        scratch = Scratch()
        one, two = self.take(scratch, 8), self.take(scratch, 8)
        assert one.data_ptr() != two.data_ptr()

    def test_what_a_collective_may_still_write_is_never_taken_again(self) -> None:
        scratch = Scratch()
        abandoned = self.take(scratch, 8)
        scratch.release([abandoned], reusable=False)
        assert self.take(scratch, 8).data_ptr() != abandoned.data_ptr()

    def test_tensors_of_others_are_passed_over(self) -> None:
        scratch, other = Scratch(), torch.empty(8)
        scratch.release([other], reusable=True)
        assert self.take(scratch, 8).data_ptr() != other.data_ptr()


class TestBackup:
    """What a discarded round brings back."""

    def backup(self, model: nn.Module) -> Backup:
        local = ModelLocal([model])
        return Backup(local, local.whole, device="cpu")

    def test_a_donors_backup_of_another_model_is_refused_whole(self) -> None:
        mine, theirs = self.backup(nn.Linear(2, 3)), self.backup(nn.Linear(2, 4))
        before = [flat.clone() for flat in mine.flats]
        with pytest.raises(
            HealError, match=r"shape \(4, 2\) for parameter weight of shape \(3, 2\)"
        ):
            mine.load(theirs.views())
        assert_close(mine.flats, before, rtol=0, atol=0)

    def test_parameters_go_back_without_losing_their_storage(self) -> None:
        model = nn.Linear(2, 3)
        backup, before, address = self.backup(model), model.weight.clone(), model.weight.data_ptr()
        model.weight.detach().zero_()
        backup.restore()
        assert_close(model.weight, before)
        assert model.weight.data_ptr() == address


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of one rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_sharded_parameters_synchronise_by_their_local_part(mesh: Any) -> None:
    model = distribute_module(nn.Linear(3, 2), mesh)
    start = [p.full_tensor().detach().clone() for p in model.parameters()]
    local = ModelLocal([model])
    outer = ModelOuter([torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)])
    node = Node(World(Script(1)), 0, 1)
    strategy = Strategy([DiLoCoRecipe(outer, 1)]).bind(local, node)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(1.0)
    strategy.after()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert_close([p.full_tensor().detach() for p in model.parameters()], [p - 0.5 for p in start])


def test_a_gradient_that_is_read_has_no_negative_zero() -> None:
    # Stacked nodes add theirs to zeros, and both must compute the same bits.
    model = nn.ParameterList([nn.Parameter(torch.ones(3))])
    model[0].grad = torch.tensor([-0.0, 1.0, -2.0])
    local = ModelLocal([model])
    (read,) = local.grads(local.whole)
    assert torch.equal(read, torch.tensor([[0.0, 1.0, -2.0]]))
    assert not torch.signbit(read[0, 0])
