"""What holds connections and hooks is neither copied nor pickled, and goes on as before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from torch import nn
from unit.test_local_sgd import alone, diloco, local_sgd
from unit.test_optim import one_step, wrapped

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper
from torchft.process_group import ProcessGroupDummy, ProcessGroupGloo

WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@every_way
def test_an_optimizer_is_refused_and_every_optimizer_still_steps(way: Any) -> None:
    weight, optimizer, manager = wrapped()
    with pytest.raises(TypeError, match=r"OptimizerWrapper cannot be copied or pickled.*\.optim"):
        way(optimizer)
    assert one_step(weight, optimizer)
    assert one_step(*wrapped()[:2])
    assert manager.current_step() == 1
    assert not hasattr(OptimizerWrapper.step, "hooked")


def test_what_it_wraps_may_be_copied() -> None:
    weight, optimizer, _ = wrapped()
    copied = copy.deepcopy(optimizer.optim)
    assert copied.param_groups[0]["params"][0] is not weight
    assert one_step(weight, optimizer)


@every_way
@pytest.mark.parametrize("make", [local_sgd, diloco])
def test_a_strategy_front_is_refused_and_its_rounds_go_on(make: Any, way: Any) -> None:
    group = alone()
    with make(group) as front:
        with pytest.raises(TypeError, match=r"save its state_dict\(\), and make another one"):
            way(front)
        for number in range(1, 13):
            group.step(number)
    assert group.manager.current_step() == 12 // front._recipe.sync_every


@every_way
@pytest.mark.parametrize("front", [DistributedDataParallel, PureDistributedDataParallel])
def test_a_wrapped_model_is_refused_and_its_module_is_not(front: Any, way: Any) -> None:
    manager = InProcessManager(Node(World(Script(1)), 0, 1))
    ddp = front(manager, nn.Linear(2, 1))
    with pytest.raises(TypeError, match=r"copy its \.module, and wrap the copy"):
        way(ddp)
    way(ddp.module)
    manager.start_quorum()
    ddp(torch.ones(1, 2)).sum().backward()
    assert manager.should_commit()


@every_way
def test_a_manager_is_refused(way: Any) -> None:
    with pytest.raises(TypeError, match=r"this Manager cannot be copied.*make one in each process"):
        way(Manager.__new__(Manager))


@every_way
@pytest.mark.parametrize(
    "group", [ProcessGroupGloo(), ProcessGroupDummy()], ids=lambda group: type(group).__name__
)
def test_a_process_group_is_refused(group: Any, way: Any) -> None:
    with pytest.raises(TypeError, match=type(group).__name__):
        way(group)
