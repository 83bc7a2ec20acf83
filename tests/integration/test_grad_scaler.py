"""torch's GradScaler on real groups: infinities are its search for a scale, and no failures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.threads import Group, groups
from torch import Tensor, nn
from torch.amp import GradScaler

from torchft.ddp import DistributedDataParallel
from torchft.optim import OptimizerWrapper
from torchft.replicated import Replicated
from torchft.strategies import AllReduceRecipe, Strategy

STEPS, BAD = 6, 2
Scales = list[float]


def net() -> nn.Module:
    model = nn.Linear(3, 2)
    for number, parameter in enumerate(model.parameters()):  # threads share torch's generator
        nn.init.constant_(parameter, 0.1 * (number + 1))
    return model


def scaler_of(scale: float = 1024.0) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=2)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)


def loss(model: nn.Module, step: int, *, bad: bool = False) -> Tensor:
    x = torch.linspace(-1, 1, 12).view(4, 3) * (step + 1)
    return 10 * model(x).square().mean() * (float("inf") if bad else 1.0)


def alone(bad: int, *, scale: float = 1024.0, clip: bool = False) -> tuple[list[Tensor], Scales]:
    """What plain torch does."""
    model, scaler, scales = net(), scaler_of(scale), []
    optimizer = sgd(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss(model, step, bad=step == bad)).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return [p.detach() for p in model.parameters()], scales


def train(
    group: Group,
    bad: int,
    *,
    scale: float = 1024.0,
    clip: bool = False,
    before: Callable[[int, Any], None] | None = None,
) -> tuple[list[Tensor], Scales, list[bool]]:
    model, scaler, scales, committed = net(), scaler_of(scale), [], []
    manager = group.manager(
        load_state_dict=model.load_state_dict, state_dict=model.state_dict, max_retries=1
    )
    wrapped = DistributedDataParallel(manager, model)
    optimizer = OptimizerWrapper(manager, sgd(model), scaler=scaler)
    quorums = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        if before is not None:
            before(step, manager)
        mine = step == bad and group.number == 0
        scaler.scale(loss(wrapped, step, bad=mine)).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        quorums.add(manager.steps.begun("the test").plan.quorum_id)
        committed.append(bool(scaler.step(optimizer)))
        scaler.update()
        scales.append(scaler.get_scale())
    assert before is not None or len(quorums) == 1, "communication works: nothing is made anew"
    return [p.detach() for p in model.parameters()], scales, committed


@pytest.mark.parametrize("clip", [False, True])
def test_an_infinity_of_one_group_lowers_the_scale_of_all_as_in_plain_torch(clip: bool) -> None:
    weights, scales = alone(BAD, clip=clip)
    for mine, theirs, committed in groups(2, lambda group: train(group, BAD, clip=clip)):
        assert theirs == scales
        assert all(torch.equal(a, b) for a, b in zip(mine, weights, strict=True))
        assert committed == [step != BAD for step in range(STEPS)]


def test_a_scale_that_is_too_large_at_first_ends_no_job() -> None:
    """More infinite steps in a row than `max_retries`, from the very first on."""
    huge = 2.0**126
    results = groups(2, lambda group: train(group, -1, scale=huge))
    for weights, scales, committed in results:
        assert 2 <= committed.index(True) < STEPS
        assert scales == results[0][1]
        assert scales[1] == huge / 4
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))


def test_a_group_that_heals_has_the_others_scale() -> None:
    results = groups(2, lambda group: train(group, -1, scale=8.0 * 4**group.number))
    assert results[0][1] == results[1][1]
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_a_step_that_fails_otherwise_leaves_the_scale_whatever_one_group_saw_in_it() -> None:
    """An infinity stays at home when nothing is averaged: the scales would part for good."""

    def fail(step: int, manager: Any) -> None:
        if step == BAD:
            manager.wait_quorum()
            manager.report_error(RuntimeError("a cable came loose"))

    results = groups(2, lambda group: train(group, BAD, before=fail))
    for weights, scales, committed in results:
        assert committed == [step != BAD for step in range(STEPS)]
        assert scales[BAD + 1 :] == results[0][1][BAD + 1 :]
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][0], strict=True))


def test_gradients_that_are_unscaled_before_they_are_averaged() -> None:
    """Then only one group's scaler sees the infinity."""

    def story(group: Group) -> tuple[Scales, list[bool]]:
        model, scaler, scales, committed = net(), scaler_of(), [], []
        manager = group.manager(max_retries=0)
        optimizer = OptimizerWrapper(manager, sgd(model), scaler=scaler)
        for step in range(STEPS):
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            mine = step == BAD and group.number == 0
            scaler.scale(loss(model, step, bad=mine)).backward()
            scaler.unscale_(optimizer)
            works = [manager.allreduce(p.grad) for p in model.parameters()]
            for work in works:
                work.wait()
            committed.append(bool(scaler.step(optimizer)))
            scaler.update()
        return scales, committed

    for scales, committed in groups(2, story):
        assert committed == [step != BAD for step in range(STEPS)]
        assert scales[1:] == alone(BAD)[1][:-1]


def test_a_scaler_that_the_optimizer_is_not_given_works_with_a_warning() -> None:
    def story(group: Group) -> tuple[Scales, list[bool]]:
        model, scaler, scales, committed = net(), scaler_of(), [], []
        wrapped = DistributedDataParallel(manager := group.manager(check_finite=False), model)
        optimizer = OptimizerWrapper(manager, sgd(model))
        for step in range(STEPS):
            optimizer.zero_grad()
            mine = step == BAD and group.number == 0
            scaler.scale(loss(wrapped, step, bad=mine)).backward()
            committed.append(bool(scaler.step(optimizer)))
            scaler.update()
            scales.append(scaler.get_scale())
        return scales, committed

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = groups(2, story)
    assert sum("scaler=scaler" in str(one.message) for one in said) == 2
    for scales, committed in results:
        assert committed == [step != BAD for step in range(STEPS)]
        assert scales == alone(BAD)[1]


def test_two_optimizers_of_one_step_share_a_scaler() -> None:
    """As a GAN has it; the infinity is in the gradients of the second alone."""

    def story(group: Group) -> tuple[Scales, list[tuple[bool, bool]], list[Tensor]]:
        models, scaler, scales, committed = [net(), net()], scaler_of(), [], []
        manager = group.manager(
            load_state_dict=lambda states: [
                m.load_state_dict(s) for m, s in zip(models, states, strict=True)
            ],
            state_dict=lambda: [m.state_dict() for m in models],
            max_retries=0,
        )
        wrapped = [DistributedDataParallel(manager, m) for m in models]
        optimizers = [OptimizerWrapper(manager, sgd(m), scaler=scaler) for m in models]
        for step in range(STEPS):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for number, model in enumerate(wrapped):
                mine = step == BAD and group.number == 0 and number == 1
                scaler.scale(loss(model, step, bad=mine)).backward()
            first, second = [bool(scaler.step(optimizer)) for optimizer in optimizers]
            committed.append((first, second))
            scaler.update()
            scales.append(scaler.get_scale())
        return scales, committed, [p.detach() for m in models for p in m.parameters()]

    results = groups(2, story)
    for scales, committed, weights in results:
        assert committed == [(step != BAD,) * 2 for step in range(STEPS)]
        assert scales == alone(BAD)[1]
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0][2], strict=True))


def test_by_replicated_an_infinity_of_one_group_skips_the_step_of_all() -> None:
    """Gradients are unscaled before they are averaged: each group has a scale of its own."""

    def story(group: Group) -> tuple[list[Tensor], Scales, list[bool]]:
        model, scaler, scales, taken = net(), scaler_of(), [], []
        manager = group.manager(load_state_dict=None, state_dict=None, max_retries=0)
        inner = sgd(model)
        replicated = Replicated(manager, model, inner, Strategy([AllReduceRecipe()]))
        for step in range(STEPS):
            replicated.zero_grad()
            mine = step == BAD and group.number == 0
            scaler.scale(loss(model, step, bad=mine)).backward()
            scaler.unscale_(inner)
            taken.append(replicated.step())
            scaler.update()
            scales.append(scaler.get_scale())
        return [p.detach() for p in model.parameters()], scales, taken

    weights, scales = alone(BAD)
    for number, (mine, theirs, taken) in enumerate(groups(2, story)):
        assert taken == [step != BAD for step in range(STEPS)]
        assert all(torch.equal(a, b) for a, b in zip(mine, weights, strict=True))
        assert (theirs == scales) == (number == 0)
