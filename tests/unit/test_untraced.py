"""torch.compile meets the hooks of every front: it ends its graph there, and they run as always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from helpers.tiny import Tiny, backward
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from unit.test_local_sgd import Group, alone, local_sgd

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.optim import OptimizerWrapper


class Watching(InProcessManager):
    """Notes whether torch.compile was at work when it was asked something."""

    def __init__(self) -> None:
        super().__init__(Node(World(Script(1)), 0, 1))
        self.compiles = False

    def start_quorum(self, *args: Any, **kwargs: Any) -> None:
        self._look()
        super().start_quorum(*args, **kwargs)

    def allreduce(self, *args: Any, **kwargs: Any) -> Any:
        self._look()
        return super().allreduce(*args, **kwargs)

    def should_commit(self, *args: Any, **kwargs: Any) -> bool:
        self._look()
        return super().should_commit(*args, **kwargs)

    def _look(self) -> None:
        # While torch.compile runs what it is given, it also compiles whatever that calls.
        self.compiles |= callable(get_eval_frame_callback())


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """`function`, and how many operations each graph of it has."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    return torch.compile(function, backend=backend), graphs


def watched() -> Group:
    group = alone()
    group.manager = Watching()
    return group


def test_the_inner_step_is_compiled_and_the_rounds_are_not() -> None:
    plain, group = alone(), watched()
    with local_sgd(group), local_sgd(plain):
        step, graphs = compiled(group.inner.step)
        for number in range(1, 7):
            plain.step(number)
            backward(group.model, 0, number)
            step()
            group.inner.zero_grad()
    assert group.manager.current_step() == 2
    assert not group.manager.compiles
    assert sum(graphs) > 0
    torch.testing.assert_close(group.weights, plain.weights, rtol=0, atol=1e-4)  # fused


@pytest.mark.slow
def test_a_compiled_function_steps_an_optimizer_whose_step_was_replaced() -> None:
    group = watched()
    inner = group.inner
    inner.step = lambda *args: type(inner).step(inner, *args)  # type: ignore[method-assign]
    with local_sgd(group):
        step, _ = compiled(lambda: inner.step())
        for number in range(1, 7):
            backward(group.model, 0, number)
            step()
            inner.zero_grad()
    assert group.manager.current_step() == 2
    assert not group.manager.compiles


@pytest.mark.parametrize(
    "front",
    [
        DistributedDataParallel,
        pytest.param(PureDistributedDataParallel, marks=pytest.mark.slow),
    ],
)
def test_a_whole_training_step_is_compiled(front: Any) -> None:
    model, manager = Tiny(), Watching()
    optimizer = OptimizerWrapper(manager, torch.optim.SGD(model.parameters(), lr=0.1))
    ddp = front(manager, model)
    before = [p.detach().clone() for p in model.first.parameters()]

    def train() -> bool:
        optimizer.zero_grad()
        backward(ddp, 0, 1)
        return optimizer.step()

    step, _ = compiled(train)
    assert [step() for _ in range(3)] == [True] * 3
    assert manager.current_step() == 3
    assert not manager.compiles
    assert not torch.equal(before[1], model.first[0].bias)


@pytest.mark.slow
def test_the_wrapped_optimizers_own_step_may_be_compiled() -> None:
    group = watched()
    optimizer = OptimizerWrapper(group.manager, group.inner)
    group.inner.step, graphs = compiled(group.inner.step)  # type: ignore[method-assign]
    for number in 1, 2:
        optimizer.zero_grad()
        backward(group.model, 0, number)
        assert optimizer.step()
    assert not group.manager.compiles
    assert sum(graphs) > 0
