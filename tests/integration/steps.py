"""What the stories of a step have in common: take one, and wait until all are in."""

from __future__ import annotations

import pytest
import torch

from torchft.manager import Manager

BOTH_MODES = pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])


def step(manager: Manager, value: float) -> tuple[bool, float]:
    """One step that averages `value`: whether it was committed, and the average."""
    tensor = torch.full((3,), value)
    manager.start_quorum()
    work = manager.allreduce(tensor)
    work.wait()
    return manager.should_commit(), tensor[0].item()


def all_are_in(manager: Manager, groups: int) -> None:
    """Step until that many are counted. All groups see it in the same quorum."""
    while True:
        assert step(manager, 1.0)[0]
        if manager.num_participants() == groups:
            return
