"""Equal states have equal digests, and nothing else does."""

from __future__ import annotations

import itertools
from collections import deque
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchft.digest import digest

DIFFERENT: list[Any] = [
    None,
    True,
    1,
    1.0,
    -0.0,
    0.0,
    1j,
    "1",
    b"1",
    "",
    [],
    {},
    [1],
    [[1]],
    [1, 2],
    [[1], [2]],
    [[1, 2]],
    ["12"],
    ["1", "2"],
    {"a": 1},
    {1: "a"},
    {"a": None},
    ["a", 1],
    torch.bfloat16,
    torch.tensor(1),
    torch.tensor([1]),
    torch.tensor([[1]]),
    torch.tensor([1], dtype=torch.int32),
    torch.tensor([1, 0], dtype=torch.int32),
    torch.tensor([0.0]),
    torch.tensor([-0.0]),
    torch.tensor([float("nan")]),
    torch.tensor([0.0], dtype=torch.bfloat16),
    torch.tensor([0.0], dtype=torch.float16),
    torch.empty(0),
    torch.empty(0, 2),
    torch.empty(0, dtype=torch.float64),
    np.array([0.0], dtype=np.float32),
    np.float32(0),
]


def test_different_states_differ() -> None:
    for a, b in itertools.combinations(DIFFERENT, 2):
        assert digest(a) != digest(b), f"{a!r} and {b!r}"


def test_a_digest_means_the_same_in_every_version() -> None:
    state = {"w": torch.arange(6.0), "step": 3}
    assert digest(state) == "d03a97a30ace65dc8aec554dfc3e95e7d8f9ca886a84b308cad91890d00c2105"


def test_key_order_device_strides_and_gradients_do_not_count() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    other = torch.nn.Parameter(weight.T.contiguous().T)
    assert digest({"a": 1, "w": weight}) != digest({"a": 1, "w": weight.T})
    assert digest({"a": 1, "w": weight}) == digest({"w": other.detach(), "a": 1})
    assert digest(other) == digest(weight)


def test_lists_and_tuples_are_alike() -> None:
    assert digest((1, 2)) == digest([1, 2])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool]
)
def test_one_changed_bit_changes_the_digest(dtype: torch.dtype) -> None:
    bits = torch.zeros(64, dtype=torch.uint8)
    before = digest(bits.view(dtype))
    bits[17] = 1
    assert digest(bits.view(dtype)) != before


@given(st.dictionaries(st.text() | st.integers(), st.integers(), max_size=5))
def test_any_order_of_keys_gives_one_digest(state: dict[Any, int]) -> None:
    assert digest(state) == digest(dict(reversed(state.items())))


@pytest.mark.parametrize("value", [object(), {object()}, torch.zeros(2).to_sparse()])
def test_what_has_no_digest_is_named_with_its_place(value: Any) -> None:
    with pytest.raises(TypeError, match=r"state\['user'\]\[1\]"):
        digest({"user": [0, value]})


def test_the_order_of_a_set_does_not_count_and_its_values_do() -> None:
    assert digest({1, "a", (2, 3)}) == digest({(2, 3), "a", 1})
    assert digest({1, 2}) != digest({1, 3})
    assert digest(deque([timedelta(1)])) != digest(deque([timedelta(2)]))


def test_a_tensor_subclass_is_refused() -> None:
    class Sharded(Tensor):
        pass

    with pytest.raises(TypeError, match=r"Sharded.*local"):
        digest(torch.zeros(2).as_subclass(Sharded))
