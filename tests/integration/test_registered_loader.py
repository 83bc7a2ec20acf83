"""torchdata's StatefulDataLoader, with worker processes, registers and heals as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.threads import Group, groups
from torch import nn

from torchft.ddp import DistributedDataParallel
from torchft.optim import OptimizerWrapper

stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")

BATCH, STEPS, AHEAD = 2, 4, 3


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, at: int) -> torch.Tensor:
        return torch.full((3,), float(at))


def loader(workers: int) -> Any:
    torch.manual_seed(0)
    return stateful_dataloader.StatefulDataLoader(Rows(), BATCH, shuffle=True, num_workers=workers)


def rows(batch: torch.Tensor) -> list[int]:
    return [int(row[0]) for row in batch]


@pytest.mark.timeout(40)
def test_a_group_that_joins_draws_the_batches_that_follow_the_donors() -> None:
    workers = 2
    torch.optim.SGD([torch.zeros(1)])  # the first one loads the compiler, once for all threads
    before = iter(whole := loader(workers))
    drawn = [rows(next(before)) for _ in range(AHEAD)]
    position = whole.state_dict()
    expected = [rows(next(before)) for _ in range(STEPS)]
    assert expected[0] not in drawn

    def story(group: Group) -> tuple[list[list[int]], str]:
        data = loader(workers)
        if group.number == 0:  # goes on from a checkpoint, and so is the donor of the other
            data.load_state_dict(position)
        model = nn.Linear(3, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
        manager = group.manager(load_state_dict=None, state_dict=None)
        manager.register(model=model, optimizer=sgd, data=data)
        wrapped = DistributedDataParallel(manager, model)
        optimizer = OptimizerWrapper(manager, sgd)
        optimizer.zero_grad()  # the other one heals before its loader is iterated
        batches, seen = iter(data), []
        for _ in range(STEPS):
            optimizer.zero_grad()
            batch = next(batches)
            seen.append(rows(batch))
            wrapped(batch).mean().backward()
            assert optimizer.step()
        return seen, manager.registered.digest_shared()

    one, other = groups(2, story)
    assert one[0] == expected
    assert one == other
