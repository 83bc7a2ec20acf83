"""The outer step over a model's own parameters: which kernel, and what it leaves as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.peers import Node, Script, World
from torch import Tensor, nn
from torch.testing import assert_close

from torchft.strategies import DiLoCoRecipe, ModelLocal, Strategy
from torchft.strategies.parts.outer import ModelOuter

MOMENTUM: dict[str, Any] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}


class Spied(nn.Module):
    """Two parameters, the first of which may have gaps."""

    def __init__(self, *, gaps: bool) -> None:
        super().__init__()
        values = torch.arange(6.0).view(2, 3)
        self.first = nn.Parameter(values.T if gaps else values)
        self.second = nn.Parameter(torch.ones(5))


def stepped(
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, *, gaps: bool = False, **options: Any
) -> tuple[list[Tensor], list[bool | None], torch.optim.Optimizer]:
    """The weights after three rounds of a unit delta; `fused` in each step; the optimizer."""
    model = Spied(gaps=gaps)
    outer = optimizer(model.parameters(), **{**MOMENTUM, **options})
    seen: list[bool | None] = []
    outer.register_step_pre_hook(lambda *_: seen.append(outer.param_groups[0]["fused"]))
    local = ModelLocal([model])
    strategy = Strategy([DiLoCoRecipe(ModelOuter([outer]), 1)])
    strategy.bind(local, Node(World(Script(1)), 0, 1))
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(1.0)
        strategy.after()
    return [p.detach() for p in model.parameters()], seen, outer


def test_sgd_steps_in_one_pass_and_keeps_its_settings() -> None:
    weights, seen, outer = stepped()
    assert seen == [True] * 3
    assert outer.param_groups[0]["fused"] is None
    plain, unfused, _ = stepped(fused=False)
    assert unfused == [False] * 3
    assert_close(weights, plain)


@pytest.mark.parametrize("spoken", [{"fused": False}, {"foreach": True}, {"foreach": False}])
def test_what_the_user_has_chosen_stands(spoken: dict[str, Any]) -> None:
    _, seen, outer = stepped(**spoken)
    assert not any(seen)
    assert {name: outer.param_groups[0][name] for name in spoken} == spoken


def test_a_parameter_with_gaps_is_not_fused() -> None:
    weights, seen, _ = stepped(gaps=True)
    assert not any(seen)
    assert_close(weights[1], stepped()[0][1])


def test_an_optimizer_of_ones_own_is_stepped_as_it_is() -> None:
    class Mine(torch.optim.SGD):
        pass

    _, seen, _ = stepped(Mine)
    assert not any(seen)


def test_settings_come_back_after_an_outer_step_that_raises() -> None:
    model = Spied(gaps=False)
    outer = torch.optim.SGD(model.parameters(), **MOMENTUM)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    outer.register_step_post_hook(broken)
    local = ModelLocal([model])
    strategy = Strategy([DiLoCoRecipe(ModelOuter([outer]), 1)])
    strategy.bind(local, Node(World(Script(1)), 0, 1))
    with pytest.raises(RuntimeError, match="broken"):
        strategy.after()
    assert outer.param_groups[0]["fused"] is None
