"""Hugging Face's Accelerate wraps optimizers without torch's step hooks, and skips their steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from unit.test_local_sgd import alone

from torchft.ddp import DistributedDataParallel
from torchft.local_sgd import LocalSGD
from torchft.optim import OptimizerWrapper

pytestmark = pytest.mark.slow
accelerate = pytest.importorskip("accelerate")


def test_steps_that_accumulate_gradients_are_not_counted() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    group = alone()
    model, optimizer = accelerator.prepare(group.model, group.inner)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer, 1))
    with LocalSGD(group.manager, model, optimizer, 3):
        for _ in range(12):
            with accelerator.accumulate(model):
                accelerator.backward((model(torch.ones(4, 5)) ** 2).mean())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    assert group.manager.current_step() == 2


def test_it_wraps_an_optimizer_that_votes_and_saves_its_state(tmp_path: Path) -> None:
    group = alone()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare_optimizer(OptimizerWrapper(group.manager, group.inner))
    ddp = DistributedDataParallel(group.manager, group.model)
    for _ in range(3):
        optimizer.zero_grad()
        (ddp(torch.ones(4, 5)) ** 2).mean().backward()
        optimizer.step()
    assert group.manager.current_step() == 3
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
