"""An optimizer that only a strategy may step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchft.errors import PhaseError
from torchft.step_guard import StepGuard


def sgd() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=0.5)


def weight(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["params"][0][0].detach())


def test_a_lone_step_is_refused_and_changes_nothing() -> None:
    optimizer = sgd()
    StepGuard(optimizer, "call replicated.step()").begin()
    with pytest.raises(PhaseError, match=r"SGD synchronises nothing: call replicated.step\(\)"):
        optimizer.step()
    assert weight(optimizer) == 1.0


@pytest.mark.parametrize("gradient", [1.0, torch.inf])
def test_a_scaler_is_refused_at_its_first_step_also_after_an_infinity(gradient: float) -> None:
    optimizer, scaler = sgd(), torch.amp.GradScaler("cpu")
    guard = StepGuard(optimizer, "call replicated.step()")
    guard.begin()
    scaler.scale(torch.ones(()))
    optimizer.param_groups[0]["params"][0].grad.fill_(gradient)
    with pytest.raises(PhaseError, match=r"call replicated.step\(\)"):
        scaler.step(optimizer)
    guard.end()
    scaler.update()
    optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
    scaler.step(optimizer)
    assert weight(optimizer) == 1.0


def test_the_strategys_own_step_is_taken() -> None:
    optimizer = sgd()
    guard = StepGuard(optimizer, "")
    guard.begin()
    with guard.allowed():
        optimizer.step()
    assert weight(optimizer) == 0.5
    with pytest.raises(PhaseError):
        optimizer.step()


def test_before_the_first_step_a_checkpoint_may_have_the_state_made_once() -> None:
    optimizer = sgd()
    StepGuard(optimizer, "")
    optimizer.step()
    with pytest.raises(PhaseError):
        optimizer.step()


def test_after_the_run_anybody_may_step() -> None:
    optimizer = sgd()
    guard = StepGuard(optimizer, "")
    guard.begin()
    guard.end()
    optimizer.step()
    assert weight(optimizer) == 0.5


def test_a_run_that_begins_anew_replaces_the_guard() -> None:
    optimizer = sgd()
    StepGuard(optimizer, "").begin()
    again = StepGuard(optimizer, "")
    with again.allowed():
        optimizer.step()
    assert weight(optimizer) == 0.5
