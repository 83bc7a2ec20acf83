"""A tensor is divided with the bits of `div_`, and judged while that is done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchft import finite
from torchft.finite import are_finite, divide

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_CHUNK", 16)


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (7, 9), (3, 16)], ids=str)
@pytest.mark.parametrize("divisor", [1, 3])
def test_it_divides_as_torch_does(dtype: torch.dtype, shape: tuple[int, ...], divisor: int) -> None:
    tensor = numbers(dtype, *shape)
    right = tensor / divisor
    assert divide(tensor, divisor) is True
    assert torch.equal(tensor, right)


def test_a_tensor_with_gaps_is_divided_whole() -> None:
    whole = numbers(torch.float32, 8, 8)
    right = whole.clone()
    right[:, ::2] /= 3
    assert divide(whole[:, ::2], 3) is True
    assert torch.equal(whole, right)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("at", [0, 15, 16, 62])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_number_is_found_wherever_it_is(bad: float, at: int, dtype: torch.dtype) -> None:
    tensor = numbers(dtype, 63)
    tensor[at] = bad
    assert divide(tensor, 2) is False


def test_infinities_that_cancel_in_different_chunks_are_found() -> None:
    tensor = torch.zeros(40)
    tensor[0], tensor[39] = INF, -INF
    assert divide(tensor) is False


@pytest.mark.parametrize(
    ("dtype", "large"), [(torch.float32, 3e38), (torch.float16, 6e4), (torch.bfloat16, 3e38)]
)
def test_numbers_whose_sum_overflows_are_no_alarm(dtype: torch.dtype, large: float) -> None:
    assert divide(torch.full((63,), large, dtype=dtype)) is True


def test_an_imaginary_infinity_is_found_and_integers_are_finite() -> None:
    assert divide(torch.tensor([complex(1, INF)])) is False
    assert are_finite([torch.arange(3), torch.tensor([True])])
