"""What a model trains changes while a front is at work: it is named, before anything is mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny import backward
from torch import nn
from torch.optim import SGD
from unit.test_local_sgd import Group, alone, diloco, local_sgd, streaming

from torchft.errors import MismatchError
from torchft.local_sgd import DiLoCo, LocalSGD

FRONTS = {"LocalSGD": local_sgd, "DiLoCo": diloco, "Streaming DiLoCo": streaming}
every_front = pytest.mark.parametrize("make", FRONTS.values(), ids=FRONTS.keys())


def frozen_layer(group: Group) -> None:
    """`second.2.weight` is frozen before the front is made."""
    group.model.second[2].weight.requires_grad_(False)
    group.trained = [p for p in group.model.parameters() if p.requires_grad]
    group.inner = SGD(group.trained, lr=0.1)


def unfreezes(group: Group) -> None:
    group.model.second[2].weight.requires_grad_(True)


def is_given_to_the_optimizer_too(group: Group) -> None:
    unfreezes(group)
    group.inner.add_param_group({"params": [group.model.second[2].weight]})


def replaces(group: Group) -> None:
    group.model.first[0] = nn.Linear(*reversed(group.model.first[0].weight.shape))


def resizes(group: Group) -> None:
    weight = group.model.first[0].weight
    weight.data = torch.ones(7, 6)


def moves(group: Group) -> None:
    group.model.double()


def adds_a_layer(group: Group) -> None:
    group.model.first.append(nn.Linear(2, 2))


def removes(group: Group) -> None:
    del group.model.first[0]


def adds_a_stranger(group: Group) -> None:
    group.inner.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


CHANGES: list[tuple[Callable[[Group], None], str]] = [
    (unfreezes, r"parameter (second\.)?2.weight was frozen before, and is trained now"),
    (is_given_to_the_optimizer_too, r"2.weight was frozen before, and is trained now"),
    (replaces, r"parameter (first\.)?0.weight was replaced by another tensor"),
    (resizes, r"0.weight was \[\d+, \d+\] float32 on cpu and is \[7, 6\] float32 on cpu"),
    (moves, r"parameter (first\.)?unused was \[3\] float32 on cpu and is \[3\] float64 on cpu"),
    (adds_a_layer, r"parameter (first\.)?\d.weight is trained, and was not there before"),
    (removes, r"parameter (first\.)?0.weight is no longer part of the model"),
    (adds_a_stranger, r"a parameter of shape \[3\] was added to group 1 of the inner optimizer"),
]


@every_front
@pytest.mark.parametrize(("change", "says"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_the_model_is_changed_in_the_loop(
    change: Callable[[Group], None], says: str, make: Callable[[Group], Any]
) -> None:
    group = alone()
    frozen_layer(group)
    with make(group):
        for number in 1, 2, 3, 4:
            group.step(number)
        backward(group.model, 0, 5)
        change(group)
        committed, before = group.manager.current_step(), group.weights
        with pytest.raises(MismatchError, match=says):
            group.inner.step()
        if change is not moves:
            torch.testing.assert_close(group.weights, before, rtol=0, atol=0)
        assert group.manager.current_step() == committed
        assert group.manager.readable


class Adapters(nn.Module):
    """Two low-rank adapters on a frozen weight, one of which is active."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3)
        self.lora = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("a", "b")})
        self.switch("a")

    def switch(self, name: str) -> None:
        self.requires_grad_(False)
        self.active = name
        self.lora[name].requires_grad_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora[self.active](x)


def test_another_adapter_is_switched_on() -> None:
    model, group = Adapters(), alone()
    inner = SGD(model.parameters(), lr=0.1)
    with LocalSGD(group.manager, model, inner, 2):
        for name in "a", "b":
            model.switch(name)
            model(torch.ones(1, 3)).sum().backward()
            if name == "a":
                inner.step()
            else:
                with pytest.raises(MismatchError, match=r"lora.b.weight was frozen before"):
                    inner.step()


def test_frozen_things_may_come_and_go() -> None:
    group = alone()
    frozen_layer(group)
    with local_sgd(group):
        group.step(1)
        group.model.second[2].weight = nn.Parameter(
            torch.zeros_like(group.model.second[2].weight), requires_grad=False
        )
        group.model.register_parameter("teacher", nn.Parameter(torch.ones(2), requires_grad=False))
        group.step(2)
        group.step(3)
    assert group.manager.current_step() == 1


class TestFrozenLater:
    """It stays in the rounds, so groups stay equal; an outer momentum must not go on moving it."""

    def test_local_sgd_goes_on_and_leaves_it_where_it_is(self) -> None:
        group = alone()
        with local_sgd(group):
            for number in 1, 2, 3:
                group.step(number)
            frozen = group.model.first[0].weight.requires_grad_(False)
            before = frozen.detach().clone()
            for number in 4, 5, 6:
                group.step(number)
        assert group.manager.current_step() == 2
        assert torch.equal(frozen, before)

    @pytest.mark.parametrize("make", [diloco, streaming])
    def test_diloco_names_it_before_a_round_that_nobody_trained_it_in(self, make: Any) -> None:
        group = alone()
        with make(group):
            for number in 1, 2, 3, 4:
                group.step(number)
            group.model.first[0].weight.requires_grad_(False)
            for number in 5, 6, 7:
                group.step(number)
            with pytest.raises(MismatchError, match=r"0.weight was frozen 4 steps ago, and the ou"):
                group.step(8)

    def test_a_gan_freezes_one_half_while_the_other_steps(self) -> None:
        group = alone()
        with diloco(group):
            for number in range(1, 9):
                group.model.first[0].weight.requires_grad_(number % 2 == 0)
                group.step(number)
        assert group.manager.current_step() == 2


def test_parameters_outside_of_the_model_are_named_for_local_sgd_too() -> None:
    group = alone()
    with pytest.warns(UserWarning, match="3 parameters of the inner optimizer are in no"):
        LocalSGD(group.manager, group.model.first, group.inner, 3)


def test_buckets_without_bucketization_do_nothing_and_say_so() -> None:
    group = alone()
    outer = SGD(group.trained, lr=0.7)
    with pytest.warns(UserWarning, match="bucket_cap_mb=4 does nothing without use_bucketization"):
        DiLoCo(group.manager, [group.model], group.inner, outer, 4, bucket_cap_mb=4)
