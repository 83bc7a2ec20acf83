"""A worker sees its optimizer's steps, and is told when the model is not the one that it serves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ps import Net, options, train
from torch import nn
from torch.optim import SGD
from unit.test_step_hooks import Accelerated, Lookahead, Plain

from torchft.errors import MismatchError, PhaseError, SettingsError
from torchft.parameter_server import DiLoCoWorker
from torchft.parameter_server.server.server import DiLoCoServer


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    with DiLoCoServer(options(tmp_path, 1)) as server:
        yield server.address


def worker_of(model: nn.Module, optimizer: Any, address: str) -> DiLoCoWorker:
    return DiLoCoWorker(model, optimizer, address, sync_every=3, codec="fp32")


@pytest.mark.parametrize("make", [Lookahead, Accelerated, Plain])
def test_an_optimizer_that_torchs_hooks_do_not_reach(address: str, make: Any) -> None:
    model = Net()
    inner = SGD(model.parameters(), lr=0.05)
    optimizer = make(inner)
    optimizer.zero_grad = inner.zero_grad
    with worker_of(model, optimizer, address) as worker:
        train(model, optimizer, seed=1, steps=12)
        took = 6 if make is Accelerated else 12
        assert (worker.local_step, worker.sync_count) == (took, took // 3)
    assert "step" not in vars(optimizer)


def test_a_worker_that_nobody_started() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05)
    worker_of(model, optimizer, "127.0.0.1:1")
    with pytest.raises(PhaseError, match=r"made and not started.*`with DiLoCoWorker\(…\):`"):
        train(model, optimizer, seed=1, steps=1)


def test_without_a_server_nothing_is_asked_of_anybody() -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05)
    worker_of(model, optimizer, "")
    train(model, optimizer, seed=1, steps=2)


def test_another_optimizer_steps(address: str) -> None:
    model = Net()
    with (
        pytest.raises(PhaseError, match="no step of SGD is seen"),
        worker_of(model, SGD(model.parameters(), lr=0.05), address),
    ):
        train(model, SGD(model.parameters(), lr=0.05), seed=1, steps=2)


def unfreezes(model: Net) -> None:
    model.frozen.requires_grad_(True)


def replaces(model: Net) -> None:
    model.h[2] = nn.Linear(6, 6)


def moves(model: Net) -> None:
    model.h[2].double()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (unfreezes, "parameter frozen was frozen before, and is trained now"),
        (replaces, "parameter h.2.weight was replaced by another tensor"),
        (moves, r"h.2.weight was \[6, 6\] float32 on cpu and is \[6, 6\] float64 on cpu"),
    ],
)
def test_the_model_changes_in_the_loop(
    address: str, change: Callable[[Net], None], says: str
) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05)
    with pytest.raises(MismatchError, match=says), worker_of(model, optimizer, address) as worker:
        train(model, optimizer, seed=1, steps=4)
        assert worker.sync_count == 1
        change(model)
        optimizer.step()


def test_a_layer_that_is_frozen_for_a_whole_cycle(address: str) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05)
    with (
        pytest.raises(MismatchError, match=r"h\.1\.weight was frozen 3 steps ago"),
        worker_of(model, optimizer, address) as worker,
    ):
        train(model, optimizer, seed=1, steps=3)
        model.h[1].weight.requires_grad_(False)
        train(model, optimizer, seed=1, steps=2)
        assert worker.sync_count == 1
        train(model, optimizer, seed=1, steps=1)


def test_a_copy_of_the_worker(address: str) -> None:
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05)
    with worker_of(model, optimizer, address) as worker:
        with pytest.raises(TypeError, match="this DiLoCoWorker cannot be copied or pickled"):
            copy.deepcopy(worker)
        train(model, optimizer, seed=1, steps=6)
        assert worker.sync_count == 2


def test_what_is_no_optimizer() -> None:
    with pytest.raises(SettingsError, match="optimizer is 'sgd', which is no optimizer"):
        worker_of(Net(), "sgd", "127.0.0.1:1")


@pytest.mark.slow
def test_a_compiled_step(address: str) -> None:
    torch._dynamo.reset()
    model = Net()
    optimizer = SGD(model.parameters(), lr=0.05)
    step = torch.compile(optimizer.step, backend="eager")
    with worker_of(model, optimizer, address) as worker:
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.ones(4, 6)).sum().backward()
            step()
        assert worker.sync_count == 2
