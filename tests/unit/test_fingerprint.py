"""Groups compare their models and settings before they mix any number."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from torchft.errors import CollectiveError, MismatchError
from torchft.manager.fingerprint import Description, compare, describe, exchange, same_world_sizes

MEMBERS = ("group_0", "group_1", "group_2")


def together(descriptions: list[Description], reference: int = 0) -> list[Exception | None]:
    """What `exchange` raises in each member."""
    store = HashStore()
    raised: list[Exception | None] = [None] * len(descriptions)

    def member(rank: int) -> Callable[[], None]:
        def run() -> None:
            try:
                exchange(
                    store,
                    descriptions[rank],
                    rank=rank,
                    members=MEMBERS[: len(descriptions)],
                    reference=reference,
                    timeout=timedelta(seconds=10),
                )
            except Exception as error:
                raised[rank] = error

        return run

    threads = [threading.Thread(target=member(rank)) for rank in range(len(descriptions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_equal_groups_pass() -> None:
    assert together([{"model": {"w": "[2] float32"}}] * 3) == [None, None, None]


def test_the_odd_one_stops_and_names_the_parameter_and_the_others_only_lose_the_step() -> None:
    right: Description = {"model": {"w": "[2] float32", "b": "[1] float32"}}
    wrong: Description = {"model": {"w": "[3] float32", "b": "[1] float32"}}
    raised = together([right, right, wrong])
    assert isinstance(raised[2], MismatchError)
    assert "group_2 differs from group_0" in str(raised[2])
    assert "model: w is [3] float32 here and [2] float32 there" in str(raised[2])
    for other in raised[:2]:
        assert isinstance(other, CollectiveError)
        assert "group_2 runs another model or other settings than group_0" in str(other)
        assert "In group_2, model: w is [2] float32 here and [3] float32 there" in str(other)


def test_the_reference_is_right_even_when_it_is_outnumbered() -> None:
    raised = together([{"size": 1}, {"size": 1}, {"size": 2}], reference=2)
    assert [type(error) for error in raised] == [MismatchError, MismatchError, CollectiveError]


def test_of_several_that_differ_all_are_named_and_the_first_is_explained() -> None:
    first, _, _ = together([{"size": 1}, {"size": 3}, {"size": 2}])
    assert "group_1, group_2 runs" in str(first)
    assert str(first).endswith("In group_1, size is 1 here and 3 there")


def test_registration_order_does_not_matter() -> None:
    assert together([{"a": 1, "b": 2}, {"b": 2, "a": 1}]) == [None, None]


def test_a_missing_parameter_is_said_to_be_absent() -> None:
    assert compare({}, {"w": "[2] float32"}) == "w is absent here and [2] float32 there"
    assert compare({"w": "[2] float32"}, {}) == "w is [2] float32 here and absent there"


def test_describe_gives_shape_and_dtype() -> None:
    assert describe([("w", torch.zeros(2, 3, dtype=torch.bfloat16))]) == {"w": "[2, 3] bfloat16"}


def test_groups_of_different_sizes_are_told_before_they_meet() -> None:
    same_world_sizes([2, 2, 2], MEMBERS, rank=1, reference=0)
    with pytest.raises(MismatchError, match="group_1 has 1 ranks and group_0 has 2"):
        same_world_sizes([2, 1, 2], MEMBERS, rank=1, reference=0)
    with pytest.raises(CollectiveError, match="group_1"):
        same_world_sizes([2, 1, 2], MEMBERS, rank=2, reference=0)


def test_a_member_that_does_not_come_is_named_and_not_its_key() -> None:
    with pytest.raises(TimeoutError, match=r"^group_1, group_2 did not say within 0\.2 s"):
        exchange(
            HashStore(),
            {"min_replica_size": 1},
            rank=0,
            members=MEMBERS,
            reference=0,
            timeout=timedelta(seconds=0.2),
        )


def test_a_difference_never_prints_a_whole_model() -> None:
    model = {f"layer_{n}.weight": "[3, 4] float32" for n in range(1000)}
    words = compare({}, {"model": model})
    assert words == "model is absent here and there with 1000 entries, such as layer_0.weight there"
    assert len(str(compare({"setting": "x" * 10_000}, {"setting": "y"}))) < 300
