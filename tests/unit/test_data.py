"""The sampler: the shards partition the data among all ranks of all groups."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.data import DistributedSampler
from torchft.errors import SettingsError


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 60), st.booleans())
def test_shards_partition_the_data(groups: int, ranks: int, size: int, shuffle: bool) -> None:
    shards = [
        list(DistributedSampler(range(size), g, groups, r, ranks, shuffle=shuffle, seed=3))
        for g in range(groups)
        for r in range(ranks)
    ]
    read = [i for shard in shards for i in shard]
    assert set(read) == set(range(size))
    assert len({len(shard) for shard in shards}) == 1
    # What is read twice only fills the last round up.
    assert len(read) - size < groups * ranks


def test_ranks_of_one_group_lie_side_by_side() -> None:
    sampler = DistributedSampler(range(8), 1, 2, 1, 2, shuffle=False)
    assert (sampler.global_rank, sampler.global_world_size) == (3, 4)
    assert list(sampler) == [3, 7]


def test_ranks_come_from_torchrun_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert DistributedSampler(range(8), 0, 2).global_rank == 1
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert DistributedSampler(range(8), 1, 2).global_world_size == 2


@pytest.mark.parametrize("ranks", [(2, 2, 0, 1), (-1, 2, 0, 1), (0, 2, 1, 1), (0, 0, 0, 1)])
def test_a_rank_beyond_its_count_is_refused(ranks: tuple[int, int, int, int]) -> None:
    with pytest.raises(SettingsError, match="must be an integer, at least"):
        DistributedSampler(range(8), *ranks)


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError):
        DistributedSampler(range(8), 0, 1, 0, 1, shufle=True)
