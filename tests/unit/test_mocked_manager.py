"""Unit tests of users' own: a mock in the manager's place, or an all-reduce of their own."""

from __future__ import annotations

from unittest.mock import create_autospec

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import Work

import torchft
from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper
from torchft.work import _DummyWork


def test_an_optimizer_votes_at_a_mocked_manager() -> None:
    manager, weight = create_autospec(Manager), nn.Parameter(torch.ones(2))
    optimizer = OptimizerWrapper(manager, torch.optim.SGD([weight], lr=1.0))
    for vote, left in ((False, 1.0), (True, 0.0), (False, 0.0)):
        optimizer.zero_grad()
        weight.sum().backward()
        manager.should_commit.return_value = vote
        optimizer.step()
        assert torch.equal(weight, torch.full((2,), left))
    assert manager.start_quorum.call_count == manager.should_commit.call_count == 3


def test_gradients_are_given_to_a_mocked_manager_one_by_one() -> None:
    manager = create_autospec(Manager)
    model = PureDistributedDataParallel(manager, nn.Linear(3, 4))
    model(torch.rand(2, 3)).mean().backward()
    assert manager.allreduce.call_count == 2


def test_an_allreduce_that_takes_a_tensor_alone_averages_buckets() -> None:
    manager, seen = create_autospec(Manager), []

    def allreduce(tensor: Tensor) -> Work:
        seen.append(tensor.numel())
        return _DummyWork(tensor)

    manager.allreduce = allreduce
    model = DistributedDataParallel(manager, nn.Linear(3, 4))
    model(torch.rand(2, 3)).mean().backward()
    assert sum(seen) == 3 * 4 + 4


def test_a_submodule_is_an_attribute_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torchft, "local_sgd", raising=False)
    assert torchft.local_sgd.DiLoCo.__module__ == "torchft.local_sgd"


def test_what_is_no_submodule_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        torchft.nothing  # noqa: B018
