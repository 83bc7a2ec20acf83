"""What training loops have in them, by each front: two groups end with equal weights, which are
those of plain torch.

A case is a feature of the loop, a front what synchronises it. The expectation has two models in one
process, the same feature, and the front's arithmetic written out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from world import Group, World

from torchft.ddp import DistributedDataParallel
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.optim import OptimizerWrapper
from torchft.replicated import Replicated
from torchft.strategies import AllReduceRecipe, Strategy

STEPS, EVERY = 6, 3


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """What a first compilation loads: once, before the groups fork. To compile something would
    start threads of autograd, which do not survive a fork."""
    importlib.import_module("torch._dynamo")


class Net(nn.Module):
    """Three layers: the last two share a weight, and the bias of the first is frozen, if asked."""

    def __init__(self, *, tied: bool = False, frozen: bool = False, recomputes: bool = False):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
        self.recomputes = recomputes
        if tied:
            self.layers[2].weight = self.layers[1].weight
        self.layers[0].bias.requires_grad_(not frozen)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputes else layer(x)
            x = torch.tanh(x)
        return x


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_both_ways(module: nn.Module) -> Any:
    """The backward pass, too."""
    return torch.compile(module, backend="aot_eager")


@dataclass(frozen=True)
class Case:
    """A feature of a loop.

    Attributes:
        net: options of the model.
        inside: what happens to the model before the front gets it.
        outside: what happens to what DistributedDataParallel returned, or else to the model after
            the front was made.
        computes: in which context the loss is computed.
        passes: backward passes of one step, of which `no_sync` hides all but the last.
        ddp: options of DistributedDataParallel.
        closure: the inner optimizer computes the loss itself.
    """

    net: dict[str, bool] = field(default_factory=dict)
    inside: Callable[[nn.Module], Any] = lambda module: module
    outside: Callable[[nn.Module], Any] = lambda module: module
    computes: Callable[[], AbstractContextManager[Any]] = nullcontext
    passes: int = 1
    ddp: dict[str, Any] = field(default_factory=dict)
    closure: bool = False

    def inner(self, model: nn.Module) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.closure:
            return torch.optim.LBFGS(trained, lr=0.1, max_iter=3)
        return SGD(trained, lr=0.1, momentum=0.9)

    def backward(self, model: Callable[[Tensor], Tensor], node: int, step: int) -> None:
        """All backward passes of a step."""
        hides = getattr(model, "no_sync", nullcontext)
        for number in range(1, self.passes + 1):
            with nullcontext() if number == self.passes else hides():
                with self.computes():
                    loss = loss_of(model, node, self.passes * step + number)
                loss.backward()

    def step(self, inner: Any, model: Callable[[Tensor], Tensor], node: int, step: int) -> None:
        """A step of the inner optimizer, in which nobody else takes part."""

        def loss() -> Tensor:
            inner.zero_grad()
            with self.computes():
                found = loss_of(model, node, step)
            found.backward()
            return found

        if self.closure:
            inner.step(loss)
        else:
            self.backward(model, node, step)
            inner.step()
            inner.zero_grad()


def loss_of(model: Callable[[Tensor], Tensor], node: int, number: int) -> Tensor:
    x = torch.linspace(-1, 1, 12).view(4, 3) * (number + 1) / (node + 2)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


CASES = {
    "nothing special": Case(),
    "autocast": Case(computes=autocast),
    "accumulation": Case(passes=3),
    "checkpointing": Case(net={"recomputes": True}),
    "a tied weight": Case(net={"tied": True}),
    "a frozen weight": Case(net={"frozen": True}),
    "all of them": Case(
        net={"tied": True, "frozen": True, "recomputes": True}, computes=autocast, passes=2
    ),
}
STATIC = {
    f"static graph, {name}": Case(ddp={"static_graph": True}, net=CASES[name].net)
    for name in ("nothing special", "checkpointing", "a tied weight", "a frozen weight")
}
COMPILED = {
    "a compiled model": Case(inside=compiled),
    "compiled afterwards": Case(outside=compiled),
}
SLOW = {
    **COMPILED,
    "a model that is compiled both ways": Case(inside=compiled_both_ways),
    "compiled both ways afterwards": Case(outside=compiled_both_ways),
}
LBFGS = {"LBFGS": Case(closure=True), "LBFGS, autocast": Case(closure=True, computes=autocast)}


# ------------------------------------------------------------------ fronts, and what they compute


def by_ddp(group: Group, case: Case) -> list[Tensor]:
    model = Net(**case.net)
    manager = group.manager(min_replica_size=2, load_state_dict=None, state_dict=None)
    manager.register(model=model)
    wrapped = case.outside(DistributedDataParallel(manager, case.inside(model), **case.ddp))
    optimizer = OptimizerWrapper(manager, case.inner(model))
    for step in range(STEPS):
        optimizer.zero_grad()
        case.backward(wrapped, group.number, step)
        assert optimizer.step(), manager.errored()
    return weights(model)


def by_replicated(group: Group, case: Case) -> list[Tensor]:
    model = Net(**case.net)
    manager = group.manager(min_replica_size=2, load_state_dict=None, state_dict=None)
    given = case.inside(model)
    replicated = Replicated(manager, given, case.inner(model), Strategy([AllReduceRecipe()]))
    used = case.outside(given)
    for step in range(STEPS):
        replicated.zero_grad()
        case.backward(used, group.number, step)
        assert replicated.step(), manager.errored()
    return weights(model)


def by_local_sgd(group: Group, case: Case) -> list[Tensor]:
    return by_context(group, case, lambda *given: LocalSGD(*given, EVERY))


def by_diloco(group: Group, case: Case) -> list[Tensor]:
    def diloco(manager: Any, model: nn.Module, inner: Any) -> DiLoCo:
        return DiLoCo(manager, [model], inner, outer_of(model.parameters()), EVERY)

    return by_context(group, case, diloco)


def by_context(group: Group, case: Case, make: Callable[..., Any]) -> list[Tensor]:
    model = Net(**case.net)
    manager = group.manager(
        min_replica_size=2, use_async_quorum=False, load_state_dict=None, state_dict=None
    )
    given, inner = case.inside(model), case.inner(model)
    with make(manager, given, inner):
        used = case.outside(given)
        for step in range(STEPS):
            case.step(inner, used, group.number, step)
    assert manager.current_step() == STEPS // EVERY
    return weights(model)


def outer_of(parameters: Iterable[nn.Parameter]) -> SGD:
    return SGD([p for p in parameters if p.requires_grad], lr=0.7, momentum=0.9, nesterov=True)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def two_models(case: Case) -> list[tuple[nn.Module, Any]]:
    models = [Net(**case.net) for _ in range(2)]
    return [(model, case.inner(model)) for model in models]


def averaged_gradients(case: Case) -> list[Tensor]:
    both = two_models(case)
    for step in range(STEPS):
        for node, (model, inner) in enumerate(both):
            inner.zero_grad()
            case.backward(model, node, step)
        for one, other in zip(*(model.parameters() for model, _ in both), strict=True):
            if one.grad is not None and other.grad is not None:
                mean = (one.grad + other.grad) / 2
                one.grad.copy_(mean)
                other.grad.copy_(mean)
        for _, inner in both:
            inner.step()
    return weights(both[0][0])


@torch.no_grad()
def averaged_weights(case: Case) -> list[Tensor]:
    both = two_models(case)
    for step in range(STEPS):
        step_both(case, both, step)
        if (step + 1) % EVERY == 0:
            for one, other in zip(*(model.parameters() for model, _ in both), strict=True):
                mean = (one + other) / 2
                one.copy_(mean)
                other.copy_(mean)
    return weights(both[0][0])


@torch.no_grad()
def outer_steps(case: Case) -> list[Tensor]:
    both, shared = two_models(case), Net(**case.net)
    outer = outer_of(shared.parameters())
    for step in range(STEPS):
        step_both(case, both, step)
        if (step + 1) % EVERY == 0:
            models = (shared, *(model for model, _ in both))
            for base, one, other in zip(*(m.parameters() for m in models), strict=True):
                base.grad = ((base - one) + (base - other)) / 2
            outer.step()
            for model, _ in both:
                model.load_state_dict(shared.state_dict())
    return weights(both[0][0])


@torch.enable_grad()
def step_both(case: Case, both: list[tuple[nn.Module, Any]], step: int) -> None:
    for node, (model, inner) in enumerate(both):
        case.step(inner, model, node, step)


FRONTS = {
    "DDP": (by_ddp, averaged_gradients, {**CASES, **COMPILED, **STATIC}),
    "Replicated": (by_replicated, averaged_gradients, CASES),
    "LocalSGD": (by_local_sgd, averaged_weights, {**CASES, **LBFGS}),
    "DiLoCo": (by_diloco, outer_steps, {**CASES, **LBFGS}),
}
ROWS = [
    pytest.param(
        *(by, right, case),
        id=f"{front}-{name}",
        marks=[pytest.mark.slow] if name not in cases else [],
    )
    for front, (by, right, cases) in FRONTS.items()
    for name, case in {**SLOW, **cases}.items()
]


@pytest.mark.parametrize(("by", "right", "case"), ROWS)
def test_two_groups_end_equal_and_as_plain_torch_does(
    tmp_path: Path, by: Callable[..., Any], right: Callable[[Case], list[Tensor]], case: Case
) -> None:
    one, two = World(tmp_path, min_replicas=2).run(*[lambda group: by(group, case)] * 2)
    assert_close(one, two, rtol=0, atol=0)
    assert_close(one, right(case), rtol=0, atol=2e-6)


@dataclass(frozen=True)
class Scaled(Case):
    """Node 0 finds an infinity in its third step, and takes one batch more for it."""

    scalers: list[GradScaler] = field(
        default_factory=lambda: [GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    )

    def step(self, inner: Any, model: Any, node: int, step: int) -> None:
        scaler, infinite = self.scalers[node], (node, step) == (0, 2)
        scaler.scale(loss_of(model, node, step)).backward()
        if infinite:
            model.layers[0].weight.grad[0, 0] = torch.inf
        scaler.step(inner)
        scaler.update()
        inner.zero_grad()
        if infinite:
            assert scaler.get_scale() == 2.0
            self.step(inner, model, node, STEPS)


@pytest.mark.parametrize("front", ["LocalSGD", "DiLoCo"])
def test_an_infinity_between_two_rounds_costs_its_group_a_step_and_nobody_a_round(
    tmp_path: Path, front: str
) -> None:
    """A group's scale is its own there: gradients are unscaled before anything is averaged."""
    by, right, _ = FRONTS[front]
    test_two_groups_end_equal_and_as_plain_torch_does(tmp_path, by, right, Scaled())
