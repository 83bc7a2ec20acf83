"""Which part of a data set each rank of each replica group reads.

The split is fixed: it follows from the number of groups, not from who is alive. The shard of a
group that is down is not read meanwhile, and a group that heals may read some of its own again.

    2 groups of 2 ranks        group 0: shards 0, 1        group 1: shards 2, 3
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.utils import data
from torch.utils.data.distributed import DistributedSampler as _TorchSampler

from torchft import settings
from torchft.arguments import check_integer

__all__ = ["DistributedSampler"]


class DistributedSampler(_TorchSampler):
    """Shard `group_rank + num_replicas * replica_rank` of `num_replicas * num_replica_groups`.

    Args:
        dataset: what to sample; it has a length.
        replica_rank: this replica group, from 0.
        num_replica_groups: how many groups there are when all are up.
        group_rank: this rank in the group; by default torch.distributed's, else `RANK`, else 0.
        num_replicas: ranks in the group; by default torch.distributed's, else `WORLD_SIZE`, else 1.
        kwargs: `shuffle`, `seed`, `drop_last`, as torch's sampler takes them.

    Raises:
        SettingsError: a rank that is not below its count.
    """

    def __init__(
        self,
        dataset: data.Dataset,
        replica_rank: int,
        num_replica_groups: int,
        group_rank: int | None = None,
        num_replicas: int | None = None,
        **kwargs: Any,
    ) -> None:
        if group_rank is None:
            group_rank = dist.get_rank() if _in_a_group() else settings.integer("RANK", 0)
        if num_replicas is None:
            num_replicas = (
                dist.get_world_size() if _in_a_group() else settings.integer("WORLD_SIZE", 1)
            )
        _check("replica_rank", replica_rank, "num_replica_groups", num_replica_groups)
        _check("group_rank", group_rank, "num_replicas", num_replicas)
        self.global_rank = group_rank + num_replicas * replica_rank
        self.global_world_size = num_replicas * num_replica_groups
        super().__init__(
            dataset, num_replicas=self.global_world_size, rank=self.global_rank, **kwargs
        )


def _in_a_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _check(rank_name: str, rank: int, count_name: str, count: int) -> None:
    check_integer(count_name, count, least=1)
    check_integer(rank_name, rank, least=0, below=count)
