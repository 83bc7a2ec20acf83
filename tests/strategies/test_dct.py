"""The transform against its definition, the blocks, and what is sent of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from torchft.strategies.parts.dct import Blocks, basis, block_side, dct, inverse_dct
from torchft.strategies.parts.largest import largest, mean_of, packed

CPU = torch.device("cpu")


def by_definition(x: Tensor) -> Tensor:
    """X[k] = s(k) Σ x[n] cos(π (2n + 1) k / 2N), one number after the other, along both sides."""
    h, w = x.shape
    out = torch.zeros(h, w, dtype=torch.float64)
    for k in range(h):
        for j in range(w):
            total = sum(
                float(x[n, m])
                * math.cos(math.pi * (2 * n + 1) * k / (2 * h))
                * math.cos(math.pi * (2 * m + 1) * j / (2 * w))
                for n in range(h)
                for m in range(w)
            )
            scale = math.sqrt((1 if k == 0 else 2) / h) * math.sqrt((1 if j == 0 else 2) / w)
            out[k, j] = scale * total
    return out


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 4), (7, 5), (8, 8)])
def test_it_is_the_orthonormal_dct(shape: tuple[int, int]) -> None:
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_close(dct(x), torch.stack([by_definition(b) for b in x]), rtol=0, atol=1e-13)
    assert_close(inverse_dct(dct(x)), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 56, 64])
def test_its_basis_is_orthonormal_and_what_should_be_zero_is(size: int) -> None:
    c = basis(size, torch.float64, CPU)
    assert_close(c.T @ c, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    small = c.abs() < 1e-9
    assert not c[small].any()
    assert size % 2 == 0 or size == 1 or small.any(), "odd waves cross zero in the middle"


@given(st.integers(1, 400), st.integers(1, 70))
def test_a_side_is_the_largest_divisor_below_the_limit(side: int, limit: int) -> None:
    found = block_side(side, limit)
    assert side % found == 0
    assert found <= limit
    assert not any(side % d == 0 for d in range(found + 1, min(side, limit) + 1))


class TestBlocks:
    """Any shape is cut and comes back."""

    shapes = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=6)

    def tensors(self, shapes: list[list[int]], rows: int = 2) -> list[Tensor]:
        return [
            torch.arange(rows * math.prod(shape), dtype=torch.float32).view(rows, *shape) + 1000 * i
            for i, shape in enumerate(shapes)
        ]

    @given(shapes, st.integers(1, 5))
    def test_what_is_cut_comes_back(self, shapes: list[list[int]], limit: int) -> None:
        tensors = self.tensors(shapes)
        blocks = Blocks(tensors, limit)
        out = [torch.full_like(t, -1) for t in tensors]
        blocks.join(blocks.cut(tensors, 1), out)
        assert_close([t[0] for t in out], [t[1] for t in tensors], rtol=0, atol=0)

    def test_a_matrix_is_cut_into_squares_and_a_convolution_is_a_matrix(self) -> None:
        tensors = self.tensors([[4, 6], [4, 3, 2], [5], []], rows=1)
        blocks = Blocks(tensors, 3)
        cut = dict(zip((g.side for g in blocks.groups), blocks.cut(tensors, 0), strict=True))
        assert {side: tuple(c.shape) for side, c in cut.items()} == {
            (2, 3): (8, 2, 3),  # 2 x 2 blocks of either
            (1, 1): (6, 1, 1),  # 5 has no divisor up to 3; a scalar
        }
        assert cut[2, 3][1].tolist() == tensors[0][0, :2, 3:].tolist()
        assert cut[2, 3][6].tolist() == tensors[1][0].reshape(4, 6)[2:, :3].tolist()

    def test_half_precision_is_computed_in_single(self) -> None:
        x = torch.randn(1, 6, 6, dtype=torch.bfloat16)
        blocks = Blocks([x], 3)
        (cut,) = blocks.cut([x], 0)
        assert cut.dtype == torch.float32
        back = torch.zeros_like(x)
        blocks.join([cut], [back])
        assert torch.equal(back, x)


class TestLargest:
    """What travels."""

    def test_the_largest_in_magnitude_of_each_chunk(self) -> None:
        chunks = [torch.tensor([[[0.0, 3.0, -4.0], [5.0, 0.0, 1.0]]])]
        where = largest(chunks, 1)
        indices, values = packed(chunks, where)
        assert (indices.tolist(), values.tolist()) == ([[2, 0]], [[-4.0, 5.0]])
        assert indices.dtype == torch.int16

    @pytest.mark.parametrize(("size", "dtype"), [(32768, torch.int16), (32769, torch.int32)])
    def test_indices_are_as_small_as_the_chunk_allows(self, size: int, dtype: Any) -> None:
        chunks = [torch.zeros(1, 1, size)]
        chunks[0][0, 0, -1] = 1.0
        indices, values = packed(chunks, largest(chunks, 1))
        assert indices.dtype == dtype
        assert mean_of([indices, values], chunks, 1)[0][0, -1] == 1.0

    def test_more_than_there_are_is_all(self) -> None:
        chunks = [torch.tensor([[[2.0, -1.0]]])]
        sent = packed(chunks, largest(chunks, 9))
        assert mean_of(sent, chunks, 9)[0].tolist() == [[2.0, -1.0]]

    @pytest.mark.parametrize("nodes", [1, 4, 12, 64])
    def test_the_mean_is_over_all_nodes_added_in_order(self, nodes: int) -> None:
        draws = torch.Generator().manual_seed(nodes)
        chunks = [
            torch.randn(nodes, 3, 7, generator=draws),
            torch.randn(nodes, 2, 5, generator=draws, dtype=torch.float64),
            torch.randn(nodes, 1, 4, generator=draws),
        ]
        where = largest(chunks, 2)
        means = mean_of(packed(chunks, where), chunks, 2)
        for chunk, at, found in zip(chunks, where, means, strict=True):
            dense = torch.zeros_like(chunk).scatter(-1, at, chunk.gather(-1, at))
            total = torch.zeros_like(dense[0])
            for row in dense:
                total = total + row
            assert torch.equal(found, total / nodes)
