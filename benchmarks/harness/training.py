"""A replica group that trains a small model, tells of each step, and ends where it is told."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from harness.group import manager_of

if TYPE_CHECKING:
    from torch import nn

    from torchft import Manager

__all__ = ["Event", "Mark", "Step", "train"]


@dataclass(frozen=True)
class Mark:
    """A process has come so far, at `t` seconds of the monotonic clock."""

    t: float
    name: str


@dataclass(frozen=True)
class Step:
    """A step has ended."""

    t: float
    step: int
    """The last committed one."""
    committed: bool
    members: int
    """Groups that were counted in it."""
    takes_part: bool
    """This group was counted."""
    digest: str
    """Of the parameters afterwards."""


Event = Mark | Step


def train(line: Connection, *, group: int, address: str, min_replicas: int, step_ms: float) -> None:
    """A worker's function: sends Marks and Steps, ends at the step that it is sent."""
    import torch

    line.send(Mark(time.monotonic(), "torch"))
    torch.set_num_threads(1)
    # Unequal on purpose: the first quorum makes all groups start from one group's model.
    torch.manual_seed(group + 1)
    model = _model()
    # Torch's optimizers import torch._dynamo when the first one is made, which takes seconds.
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    line.send(Mark(time.monotonic(), "optimizer"))
    from torchft import DistributedDataParallel, Optimizer

    line.send(Mark(time.monotonic(), "torchft"))

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": inner.state_dict()}

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    with manager_of(
        group,
        lighthouse=address,
        min_replicas=min_replicas,
        timeout_s=20,
        state_dict=state,
        load_state_dict=load,
    ) as manager:
        line.send(Mark(time.monotonic(), "manager"))
        wrapped = DistributedDataParallel(manager, model)
        _steps(line, manager, wrapped, Optimizer(manager, inner), step_ms)


def _model() -> nn.Module:
    from torch import nn

    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def _steps(
    line: Connection, manager: Manager, model: nn.Module, optimizer: Any, step_ms: float
) -> None:
    """Until the step that the parent names."""
    import torch

    from torchft.digest import digest

    last: int | None = None
    while last is None or manager.current_step() < last:
        inputs, labels = torch.randn(16, 64), torch.randint(0, 10, (16,))
        time.sleep(step_ms / 2e3)
        before = manager.current_step()
        optimizer.zero_grad()
        time.sleep(step_ms / 2e3)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        takes_part, members = manager.is_participating(), manager.num_participants()
        optimizer.step()
        line.send(
            Step(
                t=time.monotonic(),
                step=manager.current_step(),
                committed=manager.current_step() > before,
                members=members,
                takes_part=takes_part,
                digest=digest(dict(model.named_parameters())),
            )
        )
        if last is None and line.poll():
            last = line.recv()
