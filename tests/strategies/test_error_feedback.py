"""What error feedback is for: where four bits stall, four bits with feedback go on.

Each number has a target of its own. Every sixteenth has a gradient that is noise twenty times as
large, so that its neighbours' deltas are below half a code of their block and are rounded away.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchft.simulator.events import Membership
from torchft.simulator.peers import StackedPeers
from torchft.simulator.stacked import StackedLocal
from torchft.strategies import (
    DiLoCoStrategy,
    OptimSpec,
    SimpleReduceStrategy,
    Strategy,
    StreamingDiLoCoStrategy,
)

INNER = OptimSpec(torch.optim.SGD, lr=0.05)
OUTER = OptimSpec(torch.optim.SGD, lr=1.0)
STEPS = 200
STRATEGIES: dict[str, Any] = {
    "all-reduce": lambda **how: SimpleReduceStrategy(INNER, **how),
    "DiLoCo": lambda **how: DiLoCoStrategy(INNER, OUTER, H=2, **how),
    "Streaming DiLoCo": lambda **how: StreamingDiLoCoStrategy(
        INNER, OUTER, H=2, **how, fragments=2
    ),
}


class Numbers(nn.Module):
    """1500 of them, at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(700)), nn.Parameter(torch.zeros(800))


def train(strategy: Strategy, seed: int, *, nodes: int = 4) -> Tensor:
    """How far from its target each number without noise is in the end."""
    draws = torch.Generator().manual_seed(seed)
    target = torch.randn(1500, generator=draws)
    assert strategy.inner is not None
    local = StackedLocal(Numbers(), nodes, strategy.inner, STEPS)
    peers = StackedPeers(local, Membership(nodes, ()), strategy)
    strategy.bind(local, peers)
    for step in range(STEPS):
        peers.begin(step)
        strategy.begin()
        for parameters in local.parameters:
            gradient = torch.cat([p.detach() for p in parameters]) - target
            gradient[::16] += 20 * torch.randn(94, generator=draws)
            for p, part in zip(parameters, gradient.split([700, 800]), strict=True):
                p.grad = part.clone()
        strategy.step()
    reached = torch.cat([p.detach() for p in local.parameters[0]])
    return (reached - target).abs()[torch.arange(1500) % 16 != 0]


@pytest.mark.parametrize(
    ("name", "seed"),
    [("all-reduce", 0), ("DiLoCo", 0), ("DiLoCo", 1), ("DiLoCo", 2), ("Streaming DiLoCo", 0)],
)
def test_int4_stalls_and_with_feedback_it_does_not(name: str, seed: int) -> None:
    lost = train(STRATEGIES[name](codec="int4"), seed).mean()
    fed = train(STRATEGIES[name](codec="int4", error_feedback=True), seed).mean()
    assert lost > 0.4  # of the 0.8 at the start
    assert fed < 0.05
