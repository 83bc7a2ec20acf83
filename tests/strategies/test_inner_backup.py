"""The inner state that a discarded round brings back: of whose rows, and from where."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.tiny import Tiny
from torch import nn
from torch.testing import assert_close

from torchft.errors import SettingsError
from torchft.simulator.stacked import StackedLocal
from torchft.strategies import DiLoCoRecipe, Inner, ModelLocal, OptimSpec
from torchft.strategies.parts.inner_backup import InnerBackup
from torchft.strategies.recipe import Clock


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def step(local: Any, models: list[nn.Module]) -> None:
    for row, model in enumerate(models):
        for p in model.parameters():
            p.grad = torch.full_like(p, row + 1.0)
    local.inner_step()


def states(local: Any) -> Any:
    return copy.deepcopy({at: dict(state) for at, state in local.inner_states(local.whole).items()})


def test_moments_and_counters_go_back_and_the_rate_goes_on() -> None:
    model = nn.Linear(3, 2)
    optimizer = adam(model)
    local = ModelLocal([model], optimizer)
    backup = InnerBackup(local, local.whole, device="cpu")
    step(local, [model])
    backup.take()
    kept = states(local)
    step(local, [model])
    optimizer.param_groups[0]["lr"] = 0.05
    backup.restore()
    assert_close(states(local), kept, rtol=0, atol=0)
    assert optimizer.param_groups[0]["lr"] == 0.05
    step(local, [model])


def test_before_the_first_step_there_was_nothing() -> None:
    model = nn.Linear(3, 2)
    local = ModelLocal([model], adam(model))
    backup = InnerBackup(local, local.whole)
    step(local, [model])
    backup.restore()
    assert all(not state for state in states(local).values())
    step(local, [model])


def test_only_the_fragments_own_state_goes_back() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    local = ModelLocal([model], adam(model))
    first, second = local.split(2)
    backup = InnerBackup(local, first)
    step(local, [model])
    backup.restore()
    assert all(not state for state in local.inner_states(first).values())
    assert all(state["step"] == 1 for state in local.inner_states(second).values())


def test_a_simulated_node_that_heals_keeps_the_others_backups() -> None:
    local = StackedLocal(nn.Linear(3, 2), 2, Inner(OptimSpec(torch.optim.AdamW)), 10)
    backup = InnerBackup(local, local.whole)
    step(local, local.models)
    with local.limited_to([1]):
        backup.take()
    step(local, local.models)
    backup.restore()
    for (row, _), state in states(local).items():
        assert (state["step"] == 1) if row == 1 else not state


def test_a_checkpoint_has_the_inner_state_to_go_back_to() -> None:
    def recipe(model: nn.Module) -> DiLoCoRecipe:
        one = DiLoCoRecipe(OptimSpec(torch.optim.SGD, lr=1.0), 2, inner_state="restored")
        one.bind(ModelLocal([model], adam(model)), Clock())
        return one

    model = Tiny()
    saving, loading = recipe(model), recipe(Tiny())
    step(saving.local, [model])
    saving.inner_backups[0].take()
    loading.load_own_state_dict(saving.own_state_dict())
    loading.inner_backups[0].restore()
    assert_close(states(loading.local), states(saving.local), rtol=0, atol=0)


def test_steps_without_state_cannot_be_restored() -> None:
    with pytest.raises(SettingsError, match="inner_state='restored' needs"):
        recipe = DiLoCoRecipe(OptimSpec(torch.optim.SGD, lr=1.0), 2, inner_state="restored")
        recipe.bind(ModelLocal([Tiny()]), Clock())
