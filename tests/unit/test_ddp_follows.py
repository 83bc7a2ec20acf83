"""What is trained changes between two steps: it is followed, and described to the other groups."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from torch import Tensor, nn
from torch.testing import assert_close

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.errors import SettingsError
from torchft.optim import OptimizerWrapper
from torchft.trained import TrainedParameters

DOORS = [DistributedDataParallel, PureDistributedDataParallel]


def layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return model


class Adapted(nn.Linear):
    """With an adapter, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.a, self.b = (
            nn.Parameter(torch.ones(2, 1) / 2),
            nn.Parameter(torch.ones(1, 3) / 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a @ self.b


def unfreezes(model: nn.Sequential, optimizer: OptimizerWrapper) -> None:
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})


def freezes(model: nn.Sequential, optimizer: OptimizerWrapper) -> None:
    model[2].requires_grad_(False)


def replaces(model: nn.Sequential, optimizer: OptimizerWrapper) -> None:
    model[2] = nn.Linear(3, 1)
    nn.init.ones_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    optimizer.add_param_group({"params": list(model[2].parameters())})


def resizes(model: nn.Sequential, optimizer: OptimizerWrapper) -> None:
    model[0].weight.data = torch.ones(2, 2)
    model[0].bias.data = torch.ones(2)
    model[2].weight.data = torch.ones(1, 2)
    model[0].weight.grad = model[0].bias.grad = model[2].weight.grad = None
    optimizer.state.clear()


def converts(model: nn.Sequential, optimizer: OptimizerWrapper) -> None:
    model.double()
    optimizer.zero_grad()
    optimizer.state.clear()


def adapts(model: nn.Sequential, optimizer: OptimizerWrapper) -> None:
    model[0] = Adapted()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.fill_(0.5)
    model[0].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    optimizer.add_param_group({"params": [model[0].a, model[0].b]})


CHANGES = [unfreezes, freezes, replaces, resizes, converts, adapts]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("door", DOORS)
def test_a_change_in_all_groups_is_followed_from_the_next_step_on(
    door: Callable[..., nn.Module], change: Callable[..., None]
) -> None:
    def train(model: nn.Sequential, groups: list[int], node: Node | None) -> list[Tensor]:
        manager = InProcessManager(node or Node(World(Script(1)), 0, 1))
        wrapped = model if node is None else door(manager, model)
        if change is unfreezes:
            model[0].requires_grad_(False)
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        optimizer = OptimizerWrapper(manager, sgd)
        for step in range(6):
            if step == 3:
                change(model, optimizer)
            optimizer.zero_grad()
            for group in groups:
                dtype = next(model.parameters()).dtype
                x = torch.full((4, 2), group + 1.0, dtype=dtype)
                ((wrapped(x) - group).pow(2).mean() / len(groups)).backward()
            if node is None:
                assert manager.allreduce(torch.ones(1))
            assert optimizer.step()
        return [p.detach() for p in model.parameters()]

    found = World(Script(2)).run(lambda node: train(layers(), [node.rank], node))
    right = train(layers(), [0, 1], None)
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert_close(found[0], right)


@pytest.mark.parametrize("door", DOORS)
class TestOneGroup:
    """What it tells the others, and what it refuses."""

    def begin(
        self, door: Callable[..., nn.Module], model: nn.Module
    ) -> tuple[nn.Module, InProcessManager]:
        manager = InProcessManager(Node(World(Script(1)), 0, 1))
        wrapped = door(manager, model)
        self.step(manager, wrapped)
        return wrapped, manager

    def step(self, manager: InProcessManager, wrapped: nn.Module) -> bool:
        manager.start_quorum()
        wrapped(torch.ones(1, 2)).sum().backward()
        return manager.should_commit()

    def test_what_stays_is_described_once(self, door: Callable[..., nn.Module]) -> None:
        wrapped, manager = self.begin(door, layers())
        self.step(manager, wrapped)
        assert len(manager.listened) == 1
        assert manager.once == {}

    def test_what_is_frozen_is_said_to_be(self, door: Callable[..., nn.Module]) -> None:
        wrapped, manager = self.begin(door, model := layers())
        model[0].requires_grad_(False)
        self.step(manager, wrapped)
        (said,) = (d["parameters"] for d in manager.listened[-1].values())
        assert said["0.weight"] == "[3, 2] float32, frozen"
        assert said["2.weight"] == "[1, 3] float32"

    def test_the_values_of_new_parameters_are_compared_and_those_of_unfrozen_ones_are_not(
        self, door: Callable[..., nn.Module]
    ) -> None:
        model = layers()
        model[0].requires_grad_(False)
        wrapped, manager = self.begin(door, model)
        model[0].requires_grad_(True)
        self.step(manager, wrapped)
        assert manager.once == {}
        model[2] = nn.Linear(3, 1)
        self.step(manager, wrapped)
        kind = type(wrapped).__name__
        assert sorted(manager.once) == [f"new in {kind}: 2.bias", f"new in {kind}: 2.weight"]

    def test_a_parameter_that_is_unfrozen_in_the_middle_of_a_step_discards_it(
        self, door: Callable[..., nn.Module]
    ) -> None:
        model = layers()
        model[0].requires_grad_(False)
        wrapped, manager = self.begin(door, model)
        manager.start_quorum()
        model[0].weight.requires_grad_(True)
        wrapped(torch.ones(1, 2)).sum().backward()
        assert not manager.should_commit()
        error = manager.step_now.error
        assert error is not None
        assert "0.weight began to be trained in the middle of the step" in str(error)
        assert self.step(manager, wrapped)

    def test_one_that_is_frozen_in_the_middle_of_a_step_is_left_as_it_is(
        self, door: Callable[..., nn.Module]
    ) -> None:
        wrapped, manager = self.begin(door, model := layers())
        manager.start_quorum()
        model.zero_grad()
        model[0].weight.requires_grad_(False)
        wrapped(torch.ones(1, 2)).sum().backward()
        assert manager.should_commit()
        assert model[0].weight.grad is None
        assert model[2].weight.grad is not None

    def test_an_embedding_that_becomes_sparse_is_refused_when_the_step_begins(
        self, door: type[nn.Module]
    ) -> None:
        held, manager = self.begin(door, model := layers())
        model.append(nn.Embedding(3, 1, sparse=True))
        with pytest.raises(SettingsError, match=r"gradient of 3\.weight is sparse"):
            manager.start_quorum()
        assert isinstance(held, door)  # a wrapper that nobody holds is not asked

    def test_a_model_that_is_wrapped_anew_is_followed_by_the_new_wrapper_alone(
        self, door: Callable[..., nn.Module]
    ) -> None:
        wrapped, manager = self.begin(door, model := layers())
        old = weakref.ref(wrapped)
        del wrapped
        gc.collect()
        assert old() is None
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        manager.reductions.clear()
        wrapped = door(manager, model)
        assert self.step(manager, wrapped)
        assert list(manager.listened[-1]) == [type(wrapped).__name__]
        assert sum(manager.reductions) == sum(p.numel() for p in model.parameters())


def test_a_look_at_what_is_trained_sees_what_changed() -> None:
    model = layers()
    trained = TrainedParameters(model, ignored={"2.bias"})
    assert [name for name, _ in trained.named] == ["0.weight", "0.bias", "2.weight"]
    assert trained.look() is None
    model[0].bias.requires_grad_(False)
    change = trained.look()
    assert change is not None
    assert (change.added, change.removed, change.created) == ((), ("0.bias",), ())
    model[2].bias.requires_grad_(False)
    assert trained.look() is None
    model[0].bias.requires_grad_(True)
    assert trained.unseen() == "0.bias"
    change = trained.look()
    assert change is not None
    assert (change.added, change.removed, change.created) == (("0.bias",), (), ())
    assert trained.unseen() is None


def test_a_model_that_is_frozen_as_a_whole_has_not_changed() -> None:
    model = layers()
    trained = TrainedParameters(model)
    model.requires_grad_(False)
    assert trained.look() is None
    model.requires_grad_(True)
    assert trained.look() is None


class TestAParameterBesideTheModel:
    """A temperature, a head: the optimizer has it, and the wrapped model has not."""

    def train(self, *, by_hand: bool = False, named: bool = False) -> bool:
        manager = InProcessManager(Node(World(Script(1)), 0, 1))
        model, scale = layers(), nn.Parameter(torch.ones(1))
        wrapped = DistributedDataParallel(manager, model)
        beside = [("scale", scale)] if named else [scale]
        optimizer = OptimizerWrapper(
            manager,
            torch.optim.SGD([*(model.named_parameters() if named else model.parameters())], lr=0.1),
        )
        optimizer.add_param_group({"params": beside})
        optimizer.zero_grad()
        (wrapped(torch.ones(1, 2)) * scale).sum().backward()
        if by_hand:
            assert scale.grad is not None
            manager.allreduce(scale.grad)
        return optimizer.step()

    def test_is_refused_before_groups_part(self) -> None:
        with pytest.raises(
            SettingsError, match=r"parameter 0 of the optimizer's group 1, .*\(1,\)"
        ):
            self.train()

    def test_is_named_where_the_optimizer_knows_names(self) -> None:
        with pytest.raises(SettingsError, match=r"parameter scale of the optimizer's group 1"):
            self.train(named=True)

    def test_is_trained_when_the_script_averages_it(self) -> None:
        assert self.train(by_hand=True)
