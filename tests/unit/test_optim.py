"""The optimizer wrapper: a quorum before each step and a vote in it."""

from __future__ import annotations

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from torch import nn

from torchft.errors import ClosureError
from torchft.optim import OptimizerWrapper


class Begun(InProcessManager):
    """Counts its steps."""

    def start_quorum(self, *args: object, **kwargs: object) -> None:
        self.started = getattr(self, "started", 0) + 1
        super().start_quorum(*args, **kwargs)


def wrapped(*, no: tuple[int, ...] = ()) -> tuple[nn.Parameter, OptimizerWrapper, Begun]:
    manager = Begun(Node(World(Script(1, no=no)), 0, 1))
    weight = nn.Parameter(torch.ones(1))
    optimizer = OptimizerWrapper(manager, torch.optim.SGD([weight], lr=0.5, momentum=0.9))
    return weight, optimizer, manager


def one_step(weight: nn.Parameter, optimizer: OptimizerWrapper) -> bool:
    optimizer.zero_grad()
    weight.sum().backward()
    return optimizer.step()


def test_zero_grad_begins_and_step_votes() -> None:
    weight, optimizer, manager = wrapped()
    assert one_step(weight, optimizer) is True
    assert manager.started == 1
    assert manager.current_step() == 1
    assert weight.item() == 0.5


def test_a_discarded_step_leaves_weights_and_state() -> None:
    weight, optimizer, _ = wrapped(no=(1,))
    assert one_step(weight, optimizer) is False
    assert weight.item() == 1.0
    assert optimizer.state_dict()["state"] == {}
    assert one_step(weight, optimizer) is True
    assert weight.item() == 0.5


def test_a_closure_is_rejected() -> None:
    _, optimizer, _ = wrapped()
    optimizer.zero_grad()
    with pytest.raises(ClosureError, match=r"call backward\(\) before") as refused:
        optimizer.step(lambda: 0.0)
    assert isinstance(refused.value, AssertionError), "what scripts for torchft catch"


def test_an_optimizer_that_needs_a_closure_is_refused_when_it_is_wrapped() -> None:
    lbfgs = torch.optim.LBFGS([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ClosureError, match=r"LBFGS computes the loss .* or LocalSGD or DiLoCo"):
        OptimizerWrapper(wrapped()[2], lbfgs)


def test_hooks_run_around_the_steps_that_are_taken() -> None:
    weight, optimizer, _ = wrapped(no=(1,))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(f"before {weight.item()}"))
    optimizer.register_step_post_hook(lambda *_: seen.append(f"after {weight.item()}"))
    one_step(weight, optimizer)
    assert seen == []
    one_step(weight, optimizer)
    assert seen == ["before 1.0", "after 0.5"]


def test_a_state_dict_hook_runs() -> None:
    _, optimizer, _ = wrapped()
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "load"]


def test_state_and_groups_are_the_wrapped_ones() -> None:
    weight, optimizer, _ = wrapped()
    one_step(weight, optimizer)
    assert optimizer.param_groups is optimizer.optim.param_groups
    assert optimizer.state is optimizer.optim.state
    assert weight in optimizer.state
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.optim.param_groups) == 2
    saved = optimizer.state_dict()
    other = wrapped()[1]
    other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    other.load_state_dict(saved)
    assert other.state_dict()["state"][0]["momentum_buffer"].item() == 1.0


def test_a_learning_rate_schedule_takes_it() -> None:
    weight, optimizer, _ = wrapped()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    one_step(weight, optimizer)
    schedule.step()
    assert optimizer.optim.param_groups[0]["lr"] == pytest.approx(0.05)
