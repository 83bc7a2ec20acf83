"""The orders in which people call forward, `zero_grad`, backward and step, and what they skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from helpers.tiny import Breaks
from torch import Tensor, nn
from torch.testing import assert_close

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.errors import PhaseError
from torchft.optim import OptimizerWrapper

DOORS = [DistributedDataParallel, PureDistributedDataParallel]
STEPS = 4


class Counted(InProcessManager):
    """Counts the steps that were begun."""

    begins = 0

    def start_quorum(self, *args: Any, **kwargs: Any) -> None:
        before = self._round
        super().start_quorum(*args, **kwargs)
        self.begins += self._round is not before


def line(seed: int) -> nn.Linear:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape) + seed)
    return model


class Gan:
    """A generator and a discriminator, each with an optimizer, wrapped or not."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], optimize: Callable[..., Any]):
        self.models = line(0), line(1)
        self.g, self.d = (wrap(model) for model in self.models)
        self.opt_g, self.opt_d = (
            optimize(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
            for model in self.models
        )

    def d_loss(self, fake: Tensor) -> Tensor:
        return self.d(torch.ones(3, 2)).pow(2).mean() - self.d(fake.detach()).mean()

    def g_loss(self, fake: Tensor) -> Tensor:
        return self.d(fake).mean() + fake.pow(2).mean()


Z = torch.full((3, 2), 0.5)


def in_turns(gan: Gan) -> None:
    gan.opt_d.zero_grad()
    gan.d_loss(gan.g(Z)).backward()
    gan.opt_d.step()
    gan.opt_g.zero_grad()
    gan.g_loss(gan.g(Z)).backward()
    gan.opt_g.step()


def one_fake_for_both(gan: Gan) -> None:
    fake = gan.g(Z)
    gan.opt_d.zero_grad()
    gan.d_loss(fake).backward()
    gan.opt_d.step()
    gan.opt_g.zero_grad()
    gan.g_loss(fake).backward()
    gan.opt_g.step()


def all_cleared_first(gan: Gan) -> None:
    gan.opt_g.zero_grad()
    gan.opt_d.zero_grad()
    fake = gan.g(Z)
    gan.d_loss(fake).backward()
    gan.opt_d.step()
    gan.g_loss(fake).backward()
    gan.opt_g.step()


def modules_cleared(gan: Gan) -> None:
    """As the DCGAN tutorial has it."""
    gan.d.zero_grad()
    gan.d(torch.ones(3, 2)).pow(2).mean().backward()
    fake = gan.g(Z)
    (-gan.d(fake.detach()).mean()).backward()
    gan.opt_d.step()
    gan.g.zero_grad()
    gan.g_loss(fake).backward()
    gan.opt_g.step()


def frozen_in_turns(gan: Gan) -> None:
    gan.d.requires_grad_(False)
    gan.opt_g.zero_grad()
    gan.g_loss(gan.g(Z)).backward()
    gan.opt_g.step()
    gan.d.requires_grad_(True)
    gan.opt_d.zero_grad()
    gan.d_loss(gan.g(Z)).backward()
    gan.opt_d.step()


def stepped_together(gan: Gan) -> None:
    gan.opt_g.zero_grad()
    gan.opt_d.zero_grad()
    (gan.g_loss(gan.g(Z)) + gan.d(torch.ones(3, 2)).pow(2).mean()).backward()
    gan.opt_g.step()
    gan.opt_d.step()


ORDERS = [
    *(in_turns, one_fake_for_both, all_cleared_first, modules_cleared, frozen_in_turns),
    stepped_together,
]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("door", DOORS)
def test_two_models_and_two_optimizers_train_as_without_groups(
    door: Callable[..., nn.Module], order: Callable[[Gan], None]
) -> None:
    def story(node: Node) -> tuple[list[Tensor], int, int]:
        manager = Counted(node)
        gan = Gan(lambda model: door(manager, model), lambda one: OptimizerWrapper(manager, one))
        for _ in range(STEPS):
            order(gan)
        weights = [p.detach() for model in gan.models for p in model.parameters()]
        return weights, manager.begins, manager.current_step()

    plain = Gan(lambda model: model, lambda one: one)
    for _ in range(STEPS):
        order(plain)
    right = [p.detach() for model in plain.models for p in model.parameters()]
    for weights, begun, committed in World(Script(2)).run(story).values():
        assert_close(weights, right, rtol=0, atol=0)
        assert begun == committed == (STEPS if order is stepped_together else 2 * STEPS)


class Loop:
    """A model that a group trains alone or with another, on batches of its own."""

    def __init__(self, node: Node, door: Callable[..., nn.Module]) -> None:
        self.node, self.manager, self.model = node, Counted(node), line(0)
        self.wrapped = door(self.manager, self.model)
        self.optimizer = OptimizerWrapper(
            self.manager, torch.optim.SGD(self.model.parameters(), lr=0.1)
        )

    def loss(self, step: int) -> Tensor:
        return loss(self.wrapped, self.node.rank, step)

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]


def loss(model: nn.Module, node: int, step: int) -> Tensor:
    return (model(torch.full((1, 2), 1.0 + node + step)) - step).pow(2).mean()


def mean_of(*losses: Callable[[nn.Module, int], Tensor]) -> list[Tensor]:
    """Where SGD comes to on the mean of the losses, `losses[group](model, step)`."""
    model = line(0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        sgd.zero_grad()
        for one in losses:
            (one(model, step) / len(losses)).backward()
        sgd.step()
    return [p.detach() for p in model.parameters()]


BOTH = mean_of(lambda m, s: loss(m, 0, s), lambda m, s: loss(m, 1, s))


def cleared_after_forward(loop: Loop, step: int) -> None:
    found = loop.loss(step)
    loop.optimizer.zero_grad()
    found.backward()
    loop.optimizer.step()


def begun_by_hand(loop: Loop, step: int) -> None:
    found = loop.loss(step)
    loop.manager.start_quorum()
    loop.model.zero_grad()
    found.backward()
    if loop.manager.should_commit():
        loop.optimizer.optim.step()


def cleared_at_the_end(loop: Loop, step: int) -> None:
    loop.loss(step).backward()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def cleared_twice(loop: Loop, step: int) -> None:
    loop.optimizer.zero_grad()
    found = loop.loss(step)
    loop.optimizer.zero_grad()
    found.backward()
    loop.optimizer.step()


def validated_in_between(loop: Loop, step: int) -> None:
    loop.loss(step + 7)
    loop.optimizer.zero_grad()
    loop.loss(step).backward()
    loop.optimizer.step()
    with torch.no_grad():
        loop.loss(step)
    loop.wrapped.eval()
    loop.loss(step)
    loop.wrapped.train()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "order",
    [cleared_after_forward, begun_by_hand, cleared_at_the_end, cleared_twice, validated_in_between],
    ids=lambda order: order.__name__,
)
def test_each_order_is_one_step(
    door: Callable[..., nn.Module], order: Callable[[Loop, int], None]
) -> None:
    def story(node: Node) -> tuple[list[Tensor], int]:
        loop = Loop(node, door)
        for step in range(STEPS):
            order(loop, step)
        return loop.weights, loop.manager.begins - loop.manager.is_open

    for weights, begun in World(Script(2)).run(story).values():
        assert_close(weights, BOTH)
        assert begun == STEPS


@pytest.mark.parametrize("door", DOORS)
def test_a_batch_that_is_skipped_before_backward_costs_nothing(
    door: Callable[..., nn.Module],
) -> None:
    """`continue` after a look at the loss: the others wait in their backward pass for the next."""

    def story(node: Node) -> tuple[list[Tensor], int]:
        loop = Loop(node, door)
        for step in range(STEPS):
            for bad in (node.rank == 1 and step == 2, False):
                loop.optimizer.zero_grad()
                found = loop.loss(step)
                if not bad:
                    break
            found.backward()
            assert loop.optimizer.step()
        return loop.weights, loop.manager.begins

    for weights, begun in World(Script(2)).run(story).values():
        assert_close(weights, BOTH)
        assert begun == STEPS


@pytest.mark.parametrize("door", DOORS)
def test_a_step_without_a_backward_pass_contributes_zeros(door: Callable[..., nn.Module]) -> None:
    def story(node: Node) -> list[Tensor]:
        loop = Loop(node, door)
        for step in range(STEPS):
            loop.optimizer.zero_grad()
            found = loop.loss(step)
            if not (node.rank == 1 and step == 2):
                found.backward()
            assert loop.optimizer.step()
        return loop.weights

    right = mean_of(lambda m, s: loss(m, 0, s), lambda m, s: loss(m, 1, s) * (s != 2))
    for weights in World(Script(2)).run(story).values():
        assert_close(weights, right)


class TestAccumulation:
    """Several backward passes in one step."""

    def run(self, door: Callable[..., nn.Module], passes: Callable[[Loop, int], None]) -> None:
        def story(node: Node) -> list[Tensor]:
            loop = Loop(node, door)
            for step in range(STEPS):
                loop.optimizer.zero_grad()
                passes(loop, step)
                assert loop.optimizer.step()
            return loop.weights

        right = mean_of(*(lambda m, s, n=n: loss(m, n, s) + loss(m, n, s + 1) for n in (0, 1)))
        for weights in World(Script(2)).run(story).values():
            assert_close(weights, right)

    @pytest.mark.parametrize("door", DOORS)
    def test_all_are_averaged(self, door: Callable[..., nn.Module]) -> None:
        def passes(loop: Loop, step: int) -> None:
            loop.loss(step).backward()
            loop.loss(step + 1).backward()

        self.run(door, passes)

    def test_the_last_one_is_averaged(self) -> None:
        def passes(loop: Loop, step: int) -> None:
            with loop.wrapped.no_sync():
                loop.loss(step).backward()
            loop.loss(step + 1).backward()

        self.run(DistributedDataParallel, passes)

    @pytest.mark.parametrize("first", [True, False], ids=["none of them", "only the first one"])
    def test_what_is_not_averaged_by_then_is_averaged_before_the_vote(self, first: bool) -> None:
        """The last batches of an epoch, in most loops."""

        def passes(loop: Loop, step: int) -> None:
            if not first:
                loop.loss(step).backward()
            with loop.wrapped.no_sync():
                if first:
                    loop.loss(step).backward()
                loop.loss(step + 1).backward()

        self.run(DistributedDataParallel, passes)

    def test_two_forward_passes_and_then_two_backward_passes(self) -> None:
        """Of which torch's own would average the first alone."""

        def passes(loop: Loop, step: int) -> None:
            losses = loop.loss(step), loop.loss(step + 1)
            for one in losses:
                one.backward()

        self.run(DistributedDataParallel, passes)


@pytest.mark.parametrize("door", DOORS)
def test_a_backward_pass_that_raised_does_not_end_training(door: Callable[..., nn.Module]) -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = line(0), line(1)
            self.broken = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(Breaks.apply(x) if self.broken else x)

    manager, model = InProcessManager(Node(World(Script(1)), 0, 1)), Layers()
    wrapped = door(manager, model)
    optimizer = OptimizerWrapper(manager, torch.optim.SGD(model.parameters(), lr=0.1))
    for model.broken in (True, False, False):
        optimizer.zero_grad()
        found = wrapped(torch.ones(1, 2)).sum()
        if model.broken:
            with pytest.raises(RuntimeError, match="broken"):
                found.backward()
        else:
            found.backward()
            assert all(p.grad is not None and p.grad.any() for p in model.parameters())
            assert optimizer.step()


def test_an_optimizer_steps_once_in_a_step() -> None:
    manager = InProcessManager(Node(World(Script(1)), 0, 1))
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    one, two = (OptimizerWrapper(manager, torch.optim.SGD([w], lr=0.5)) for w in weights)
    one.zero_grad()
    sum(w.sum() for w in weights).backward()
    assert one.step()
    with pytest.raises(PhaseError, match="no step is open"):
        one.step()
    assert two.step()
    with pytest.raises(PhaseError, match="no step is open"):
        two.step()
    assert [w.item() for w in weights] == [0.5, 0.5]


def test_the_second_optimizer_skips_what_was_voted_down() -> None:
    manager = InProcessManager(Node(World(Script(1, no={1})), 0, 1))
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    one, two = (OptimizerWrapper(manager, torch.optim.SGD([w], lr=0.5)) for w in weights)
    for committed in (False, True):
        one.zero_grad()
        two.zero_grad()
        sum(w.sum() for w in weights).backward()
        assert one.step() is committed
        assert two.step() is committed
    assert [w.item() for w in weights] == [0.5, 0.5]
