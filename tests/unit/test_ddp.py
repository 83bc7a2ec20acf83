"""Gradients averaged among groups: torch's DDP over a manager, and the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from helpers.tiny import Breaks, Tiny, backward
from torch import Tensor, nn
from torch.testing import assert_close

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.errors import SettingsError
from torchft.optim import OptimizerWrapper
from torchft.quantization import BFloat16
from torchft.strategies import AllReduceRecipe, ModelLocal, Strategy

DOORS = [DistributedDataParallel, PureDistributedDataParallel]
STEPS = 5


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def by_door(door: Callable[..., nn.Module], node: Node, **options: Any) -> list[Tensor]:
    model, manager = Tiny(), InProcessManager(node)
    wrapped = door(manager, model, **options)
    optimizer = OptimizerWrapper(manager, sgd(model))
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(wrapped, node.rank, step)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def by_recipe(node: Node) -> list[Tensor]:
    model = Tiny()
    strategy = Strategy([AllReduceRecipe()]).bind(ModelLocal([model], sgd(model)), node)
    for step in range(STEPS):
        strategy.begin()
        model.zero_grad()
        backward(model, node.rank, step)
        strategy.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "script",
    [Script(1), Script(2), Script(3), Script(3, no={2, 4}), Script(3, lost={0: 3})],
    ids=["1 group", "2 groups", "3 groups", "noes", "a loss"],
)
def test_the_door_equals_the_recipe_bit_for_bit(
    door: Callable[..., nn.Module], script: Script
) -> None:
    doors = World(script).run(lambda node: by_door(door, node))
    recipes = World(script).run(by_recipe)
    assert doors.keys() == recipes.keys()
    for node, weights in recipes.items():
        assert_close(doors[node], weights, rtol=0, atol=0)


def test_many_small_buckets_give_the_same() -> None:
    script = Script(2)
    doors = World(script).run(
        lambda node: by_door(DistributedDataParallel, node, bucket_cap_mb=0.0001)
    )
    assert_close(doors, World(script).run(by_recipe), rtol=0, atol=0)


@pytest.mark.parametrize("codec", [False, True, "fp8", BFloat16()], ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_gradients_1_and_3_end_as_2_in_both(door: Callable[..., nn.Module], codec: Any) -> None:
    """An old failing that must not come back: nobody waited for the average, which therefore never
    ran, and the groups committed gradients that differ."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x).sum()

    def story(node: Node) -> float:
        model, manager = Scale(), InProcessManager(node)
        wrapped = door(manager, model, should_quantize=codec)
        manager.start_quorum()
        wrapped(torch.tensor([1.0, 3.0][node.rank])).backward()
        assert model.weight.grad is not None
        after_backward = model.weight.grad.item()
        assert manager.should_commit()
        assert model.weight.grad.item() == after_backward
        return after_backward

    means = World(Script(2)).run(story)
    assert means[0] == means[1] == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("script", [Script(3), Script(3, no={2}), Script(3, lost={0: 3})], ids=str)
def test_encoded_gradients_are_the_quantised_means(script: Script) -> None:
    def by_hand(node: Node) -> list[Tensor]:
        model, manager = Tiny(), InProcessManager(node)
        optimizer = OptimizerWrapper(manager, sgd(model))
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, node.rank, step)
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    manager.allreduce(p.grad, should_quantize="int4")
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    def encoded(node: Node) -> list[Tensor]:
        return by_door(PureDistributedDataParallel, node, should_quantize="int4")

    doors, hands = World(script).run(encoded), World(script).run(by_hand)
    assert_close(doors, hands, rtol=0, atol=0)


class TestCodec:
    """Gradients travel encoded."""

    @pytest.mark.parametrize("door", DOORS)
    @pytest.mark.parametrize(("given", "name"), [(True, "int8"), ("int4", "int4")])
    def test_its_name_is_compared(
        self, door: Callable[..., nn.Module], given: Any, name: str
    ) -> None:
        manager, plain = (InProcessManager(Node(World(Script(1)), 0, 1)) for _ in range(2))
        door(manager, nn.Linear(2, 3), should_quantize=given)
        door(plain, nn.Linear(2, 3))
        assert manager.described["codec"] == [name]
        assert "codec" not in plain.described

    @pytest.mark.parametrize("door", DOORS)
    def test_one_that_does_not_fit_is_refused_before_anything_is_trained(
        self, door: Callable[..., nn.Module]
    ) -> None:
        manager = InProcessManager(Node(World(Script(1)), 0, 1))
        with pytest.raises(SettingsError, match="'int5': it must be one of"):
            door(manager, nn.Linear(2, 3), should_quantize="int5")
        with pytest.raises(SettingsError, match="no float64"):
            door(manager, nn.Linear(2, 3).double(), should_quantize="fp32")
        assert manager.described == {}


class TestPure:
    """What torch's DDP gives for free."""

    def alone(self, model: nn.Module) -> tuple[PureDistributedDataParallel, InProcessManager]:
        manager = InProcessManager(Node(World(Script(1)), 0, 1))
        return PureDistributedDataParallel(manager, model), manager

    def test_forward_takes_keywords(self) -> None:
        class Add(nn.Linear):
            def forward(self, x: Tensor, *, plus: float = 0.0) -> Tensor:
                return super().forward(x) + plus

        model = Add(2, 2)
        wrapped, _ = self.alone(model)
        x = torch.ones(1, 2)
        assert_close(wrapped(x, plus=1.0), model(x) + 1.0)

    def test_state_dict_is_the_modules(self) -> None:
        model = Tiny()
        wrapped, _ = self.alone(model)
        assert wrapped.state_dict().keys() == model.state_dict().keys()
        wrapped.load_state_dict(Tiny(5).state_dict())
        assert_close(model.state_dict(), Tiny(5).state_dict())

    def test_a_backward_that_raises_does_not_end_averaging(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        wrapped, manager = self.alone(model)
        manager.start_quorum()
        with pytest.raises(RuntimeError, match="broken"):
            model[1](Breaks.apply(model[0](torch.ones(1, 2)))).sum().backward()
        assert manager.reductions == []
        wrapped(torch.ones(1, 2)).sum().backward()
        assert len(manager.reductions) == 4

    def test_a_parameter_that_only_the_other_group_uses_is_averaged(self) -> None:
        class Either(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left = nn.Parameter(torch.ones(1))
                self.right = nn.Parameter(torch.ones(1))

            def forward(self, left: bool) -> Tensor:
                return (self.left if left else self.right).sum()

        def story(node: Node) -> tuple[float, float]:
            model, manager = Either(), InProcessManager(node)
            wrapped = PureDistributedDataParallel(manager, model)
            manager.start_quorum()
            wrapped(node.rank == 0).backward()
            assert model.left.grad is not None and model.right.grad is not None
            return model.left.grad.item(), model.right.grad.item()

        assert World(Script(2)).run(story) == {0: (0.5, 0.5), 1: (0.5, 0.5)}


@pytest.mark.parametrize("door", DOORS)
def test_the_model_is_described_to_the_other_groups(door: Callable[..., nn.Module]) -> None:
    manager = InProcessManager(Node(World(Script(1)), 0, 1))
    wrapped = door(manager, nn.Linear(2, 3))
    always, _ = manager.listeners.before_step()
    described: Any = always[type(wrapped).__name__]
    assert described["parameters"] == {"weight": "[3, 2] float32", "bias": "[3] float32"}


@pytest.mark.parametrize(
    "options",
    [
        {"process_group": None},
        {"skip_all_reduce_unused_params": True},
        {"delay_all_reduce_named_params": []},
        {"mixed_precision": None},
    ],
    ids=str,
)
def test_what_cannot_hold_while_groups_change_is_refused(options: dict[str, Any]) -> None:
    manager = InProcessManager(Node(World(Script(1)), 0, 1))
    with pytest.raises(SettingsError, match=f"{next(iter(options))} cannot be given"):
        DistributedDataParallel(manager, nn.Linear(2, 3), **options)
