"""Two gloo ranks in one process: the smallest real collective, for the doctor."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
from torch.distributed import HashStore, ProcessGroupGloo, Store

__all__ = ["average_of_pair"]


def average_of_pair(*, timeout_s: float) -> float:
    """The mean of 1 and 2 by an all-reduce. Raises what gloo raises, within `timeout_s`."""
    store = HashStore()
    with ThreadPoolExecutor(2) as ranks:
        sums = [ranks.submit(_sum, store, rank, timeout_s) for rank in range(2)]
        return sums[0].result() / 2


def _sum(store: Store, rank: int, timeout_s: float) -> float:
    group = ProcessGroupGloo(store, rank, 2, timedelta(seconds=timeout_s))
    value = torch.tensor([rank + 1.0])
    group.allreduce([value]).wait()  # type: ignore[attr-defined]
    return float(value.item())
