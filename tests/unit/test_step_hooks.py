"""Optimizers of every make drive LocalSGD: each step is seen once, or it is an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny import backward
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from unit.test_local_sgd import Group, alone, diloco, local_sgd

from torchft.errors import PhaseError, SettingsError
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.step_hooks import StepHooks


class Lookahead(Optimizer):
    """A wrapper that leaves Optimizer.__init__ out, and goes on after the inner step."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.slow = [p.detach().clone() for p in inner.param_groups[0]["params"]]
        self._optimizer_step_pre_hooks: Any = {}
        self._optimizer_step_post_hooks: Any = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
            p.copy_(slow.lerp_(p, 0.5))


class Accelerated(Optimizer):
    """As Accelerate wraps: no Optimizer.__init__, and every second call does nothing."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner
        self.called = 0

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:
        self.called += 1
        if self.called % 2 == 0:
            self.optimizer.step()


class Sharing(Optimizer):
    """Takes the inner optimizer's attributes as its own."""

    def __init__(self, inner: Optimizer) -> None:
        self.__dict__.update(inner.__dict__)
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


class Decaying(SGD):
    """Its step calls that of its base class, which may have hooks as well."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Sharpness(Optimizer):
    """Disturbs the weights between two backward passes; the loop calls neither of `step`."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.base_optimizer = inner

    @torch.no_grad()
    def first_step(self) -> None:
        trained = self.param_groups[0]["params"]
        self.shift = [torch.zeros_like(p) if p.grad is None else 0.1 * p.grad for p in trained]
        for shift, p in zip(self.shift, trained, strict=True):
            p.add_(shift)

    @torch.no_grad()
    def second_step(self) -> None:
        for shift, p in zip(self.shift, self.param_groups[0]["params"], strict=True):
            p.sub_(shift)
        self.base_optimizer.step()


class Plain:
    """No torch optimizer at all."""

    def __init__(self, inner: Optimizer) -> None:
        self.param_groups = [{"params": [p]} for p in inner.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(0.1 * p.grad if p.grad is not None else 0.0)

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def decaying(inner: Optimizer) -> Optimizer:
    parameters = inner.param_groups[0]["params"]
    SGD(parameters, lr=0.1)  # puts hooks around the step of the base class too
    return Decaying(parameters, lr=0.1)


def replaced(inner: Optimizer) -> Optimizer:
    other = SGD(inner.param_groups[0]["params"], lr=0.1)
    inner.step = lambda closure=None: other.step()  # type: ignore[method-assign]
    return inner


def scheduled(inner: Optimizer) -> Optimizer:
    torch.optim.lr_scheduler.StepLR(inner, 100)
    return inner


def overwritten(inner: Optimizer) -> Optimizer:
    step = inner.step
    inner.step = lambda *args: step(*args)  # type: ignore[method-assign]
    return inner


def only_step(optimizer: Any) -> None:
    optimizer.step()


def sharpened(optimizer: Any) -> None:
    optimizer.first_step()
    optimizer.second_step()


def train(group: Group, optimizer: Any, steps: int, step: Callable[[Any], None]) -> None:
    for number in range(1, steps + 1):
        backward(group.model, 0, number)
        step(optimizer)
        group.inner.zero_grad()


MAKES: dict[str, tuple[Callable[[Optimizer], Any], Callable[[Any], None]]] = {
    "torch's": (lambda inner: inner, only_step),
    "one that a schedule watches": (scheduled, only_step),
    "a wrapper without __init__": (Lookahead, only_step),
    "a wrapper that shares all attributes": (Sharing, only_step),
    "a subclass that calls its base": (decaying, only_step),
    "no torch optimizer": (Plain, only_step),
    "a step that was replaced": (replaced, only_step),
    "a step that was replaced and calls the old one": (overwritten, only_step),
    "sharpness-aware, without step()": (Sharpness, sharpened),
}


@pytest.mark.parametrize(("make", "step"), MAKES.values(), ids=MAKES.keys())
def test_each_step_is_seen_once(
    make: Callable[[Optimizer], Any], step: Callable[[Any], None]
) -> None:
    alone_at_it = alone()
    train(alone_at_it, make(alone_at_it.inner), 6, step)
    group = alone()
    optimizer = make(group.inner)
    found = vars(optimizer).get("step")
    with LocalSGD(group.manager, group.model, optimizer, 3) as door:
        train(group, optimizer, 6, step)
        assert door._strategy.clock.steps == 6
    assert group.manager.current_step() == 2
    assert vars(optimizer).get("step") is found
    torch.testing.assert_close(group.weights, alone_at_it.weights, rtol=0, atol=0)
    train(group, optimizer, 3, step)
    assert group.manager.current_step() == 2


def test_a_wrapper_that_only_steps_every_second_time_counts_what_it_took() -> None:
    group = alone()
    optimizer = Accelerated(group.inner)
    with LocalSGD(group.manager, group.model, optimizer, 3):
        train(group, optimizer, 12, only_step)
        assert group.manager.readable
    assert group.manager.current_step() == 2


def test_a_schedule_that_is_made_inside_keeps_working_after_it() -> None:
    group = alone()
    optimizer = Lookahead(group.inner)
    with LocalSGD(group.manager, group.model, optimizer, 3):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        train(group, optimizer, 3, only_step)
        schedule.step()
    train(group, optimizer, 3, only_step)
    assert group.manager.current_step() == 1


def test_a_scaler_that_skips_a_step_takes_none() -> None:
    group = alone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with local_sgd(group) as door:
        for number in range(1, 5):
            backward(group.model, 0, number)
            if number == 2:
                group.trained[0].grad = torch.full_like(group.trained[0], torch.inf)
            scaler.scale(torch.ones(1))
            scaler.step(group.inner)
            scaler.update()
            group.inner.zero_grad()
        assert door._strategy.clock.steps == 3
    assert group.manager.current_step() == 1


def test_a_closure_with_several_backward_passes_is_one_step() -> None:
    group = alone()
    group.inner = torch.optim.LBFGS(group.trained, lr=0.01, max_iter=4)

    def loss() -> torch.Tensor:
        group.inner.zero_grad()
        backward(group.model, 0, 1)
        return torch.ones(())

    with local_sgd(group):
        for _ in range(3):
            group.inner.step(loss)
    assert group.manager.current_step() == 1


class TestStepsThatNobodySees:
    """An error, not a training run without a single round."""

    @pytest.mark.parametrize("steps", [1, 2, 3, 8])
    @pytest.mark.parametrize("make", [local_sgd, diloco])
    def test_a_copy_of_the_optimizer_steps(self, make: Any, steps: int) -> None:
        group = alone()
        other = AdamW(group.trained, lr=0.1)
        with pytest.raises(PhaseError, match="no step of AdamW is seen"), make(group):
            train(group, other, steps, only_step)

    def test_parameters_step_in_the_backward_pass(self) -> None:
        group = alone()
        for p in group.trained:
            own = SGD([p], lr=0.1)
            p.register_post_accumulate_grad_hook(lambda _, own=own: own.step())
        with pytest.raises(PhaseError, match="no step of AdamW is seen"), local_sgd(group):
            train(group, SGD(group.trained, lr=0.0), 4, lambda _: None)

    def test_another_optimizer_takes_its_place_in_the_middle(self) -> None:
        group = alone()
        with pytest.raises(PhaseError, match="no other object in its place"), local_sgd(group):
            train(group, group.inner, 4, only_step)
            train(group, SGD(group.trained, lr=0.1), 3, only_step)

    def test_weights_are_written_past_the_version_counter(self) -> None:
        group = alone()
        with pytest.raises(PhaseError, match="no step of AdamW is seen"), local_sgd(group):
            train(group, Plain(group.inner), 3, only_step)

    def test_accumulating_gradients_is_no_step(self) -> None:
        group = alone()
        with local_sgd(group):
            train(group, group.inner, 9, lambda _: None)
            train(group, group.inner, 3, only_step)
        assert group.manager.current_step() == 1

    def test_leaving_by_an_error_says_nothing_else(self) -> None:
        group = alone()
        with pytest.raises(KeyError), local_sgd(group):
            train(group, SGD(group.trained, lr=0.1), 2, only_step)
            raise KeyError


class TestWithoutEntering:
    """`DiLoCo(…)` alone, without `with`."""

    @pytest.mark.parametrize("make", [local_sgd, diloco])
    def test_the_first_step_is_an_error(self, make: Any) -> None:
        group = alone()
        make(group)
        before = group.weights
        with pytest.raises(PhaseError, match=r"was made and not entered.*`with \w+\(…\):`"):
            group.step(1)
        torch.testing.assert_close(group.weights, before, rtol=0, atol=0)

    def test_steps_that_only_make_state_for_a_checkpoint_are_allowed(self) -> None:
        group = alone()
        door = local_sgd(group)
        for p in group.trained:
            p.grad = torch.zeros_like(p)
        group.inner.step()
        group.run(door, steps=3)
        assert group.manager.current_step() == 1


class TestWhatIsNoOptimizer:
    """It is named, and so is the argument."""

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ("adamw", "the inner optimizer is 'adamw', which is no optimizer"),
            (AdamW, r"is the class AdamW: give an optimizer made of it, such as AdamW\(model"),
            (nn.Linear(1, 1), "is a Linear, which is no optimizer"),
            (None, "is None, which is no optimizer"),
        ],
    )
    def test_inner(self, given: Any, says: str) -> None:
        group = alone()
        group.inner = given
        for make in local_sgd, diloco:
            with pytest.raises(SettingsError, match=says):
                make(group)

    def test_outer(self) -> None:
        group = alone()
        for outer in "sgd", ["sgd"], SGD:
            with pytest.raises(SettingsError, match="outer_optimizer is"):
                DiLoCo(group.manager, [group.model], group.inner, outer, 4)  # type: ignore[arg-type]

    def test_one_whose_step_can_neither_be_hooked_nor_replaced(self) -> None:
        class Slotted:
            __slots__ = ("param_groups",)

            def __init__(self) -> None:
                self.param_groups = [{"params": [nn.Parameter(torch.ones(1))]}]

            def step(self) -> None: ...

        hooks = StepHooks(Slotted(), before=lambda: None, after=lambda: None)
        with pytest.raises(SettingsError, match="the steps of a Slotted cannot be seen"):
            hooks.attach()


@pytest.mark.parametrize("make", [lambda inner: inner, Plain])
def test_the_optimizer_may_be_copied_meanwhile(make: Any) -> None:
    """A trainer's deepcopy steps its own copies of the parameters, and no round."""
    group = alone()
    optimizer = make(group.inner)
    with LocalSGD(group.manager, group.model, optimizer, 3):
        copied = copy.deepcopy(optimizer)
        train(group, optimizer, 3, only_step)
        before = group.weights
        for p in copied.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        copied.step()
    assert group.manager.current_step() == 1
    torch.testing.assert_close(group.weights, before, rtol=0, atol=0)


def test_an_optimizer_of_another_model_is_refused() -> None:
    """For one, of a model before it was converted: averages would be written where it does not
    look."""
    group, other = alone(), alone()
    for make in local_sgd, diloco:
        group.inner = SGD(other.trained, lr=0.1)
        with pytest.raises(SettingsError, match="steps none of the model's 8 trained parameters"):
            make(group)
