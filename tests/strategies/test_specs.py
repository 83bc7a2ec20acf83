"""Optimizers, schedules and inner steps that are made later, elsewhere, several times."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim import lr_scheduler as torch_schedules
from torch.testing import assert_close

from torchft.errors import SettingsError
from torchft.strategies import Inner, OptimSpec, ScheduleSpec, ensure_optim_spec


def parameters(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(1)
    made = [nn.Parameter(torch.randn(size, generator=draws).to(dtype)) for size in sizes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=draws).to(dtype)
    return made


class TestOptimSpec:
    """A class and its arguments."""

    def test_it_builds_what_torch_builds(self) -> None:
        mine, theirs = parameters(3, 8), parameters(3, 8)
        OptimSpec(AdamW, lr=0.1, weight_decay=0.3).build(mine).step()
        AdamW(theirs, lr=0.1, weight_decay=0.3).step()
        assert_close(mine, theirs)

    def test_a_model_or_its_parameters(self) -> None:
        model = nn.Linear(2, 2)
        spec = OptimSpec(SGD, lr=0.5)
        groups = [spec.build(of).param_groups[0] for of in (model, model.parameters())]
        assert groups[0]["params"] == groups[1]["params"] == list(model.parameters())
        assert [g["lr"] for g in groups] == [0.5, 0.5]

    @pytest.mark.parametrize(
        ("name", "cls"),
        [
            ("adam", Adam),
            ("AdamW", AdamW),
            ("SGD", SGD),
            ("rmsprop", RMSprop),
            ("Adagrad", Adagrad),
        ],
    )
    def test_by_name(self, name: str, cls: Any) -> None:
        assert OptimSpec.from_string(name, lr=0.2) == OptimSpec(cls, lr=0.2)

    def test_it_pickles(self) -> None:
        spec = OptimSpec(SGD, lr=0.7, momentum=0.9, nesterov=True)
        copy = pickle.loads(pickle.dumps(spec))
        assert copy == spec
        assert copy.build(parameters(2)).param_groups[0]["nesterov"] is True

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: OptimSpec(AdamW, learning_rate=1), "learning_rate"),
            (lambda: OptimSpec(SGD, params=[]), "params"),
            (lambda: OptimSpec(nn.Linear), "optimizer class"),  # type: ignore[arg-type]
            (lambda: OptimSpec(SGD([nn.Parameter()])), "optimizer class"),  # type: ignore[arg-type]
            (lambda: OptimSpec.from_string("adamv"), "adamw"),
            (lambda: OptimSpec(LBFGS), "LBFGS .* closure"),
            (lambda: ensure_optim_spec(OptimSpec(SGD), lr=1), "lr"),
            (lambda: ensure_optim_spec(3), "optimizer class"),  # type: ignore[arg-type]
        ],
    )
    def test_what_it_cannot_be_is_refused_at_once(self, make: Any, says: str) -> None:
        with pytest.raises(SettingsError, match=says):
            make()

    def test_whatever_stands_for_a_spec(self) -> None:
        assert ensure_optim_spec("sgd", lr=1) == OptimSpec(SGD, lr=1)
        assert ensure_optim_spec(SGD, lr=1) == OptimSpec(SGD, lr=1)
        assert ensure_optim_spec(OptimSpec(SGD)) == OptimSpec(SGD)
        assert ensure_optim_spec(None) == OptimSpec(AdamW)
        assert ensure_optim_spec(None, OptimSpec(Adam)) == OptimSpec(Adam)

    @pytest.mark.parametrize("cls", [SGD, Adam, AdamW, Adagrad])
    def test_the_fused_kernel_is_taken_where_there_is_one(self, cls: type[Optimizer]) -> None:
        assert OptimSpec(cls).build(parameters(2)).defaults["fused"] is True
        assert not OptimSpec(cls, fused=False).build(parameters(2)).defaults["fused"]
        assert not OptimSpec(cls, foreach=True).build(parameters(2)).defaults["fused"]

    def test_an_optimizer_without_one_is_built_as_it_is(self) -> None:
        OptimSpec(RMSprop, lr=0.1).build(parameters(2)).step()

    def test_its_settings_as_plain_data(self) -> None:
        spec = OptimSpec(AdamW, lr=torch.tensor(0.1), betas=(0.9, 0.99))
        assert spec.config() == {"name": "AdamW", "lr": "tensor(0.1000)", "betas": [0.9, 0.99]}


def rates(schedule: ScheduleSpec, steps: int, lr: float = 1.0) -> list[float]:
    optimizer = SGD(parameters(1), lr=lr)
    built, seen = schedule.build(optimizer, steps), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        built.step()
    return seen


def torchs(make: Any, steps: int, lr: float = 1.0) -> list[float]:
    optimizer = SGD(parameters(1), lr=lr)
    built, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        built.step()
    return seen


class TestSchedule:
    """Rates against torch's own."""

    @pytest.mark.parametrize(
        ("cls", "kwargs"),
        [
            (torch_schedules.StepLR, {"step_size": 3, "gamma": 0.5}),
            (torch_schedules.CosineAnnealingLR, {"T_max": 9}),
            (torch_schedules.OneCycleLR, {"max_lr": 2.0, "total_steps": 30}),
        ],
    )
    def test_any_scheduler_of_torch(self, cls: Any, kwargs: dict[str, Any]) -> None:
        assert rates(ScheduleSpec(cls, **kwargs), 20) == torchs(partial(cls, **kwargs), 20)

    def test_warm_up_is_linear_and_the_first_step_counts(self) -> None:
        seen = rates(ScheduleSpec("lambda_cosine", warmup_steps=4), 7, lr=2.0)
        assert seen == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0]
        linear = partial(torch_schedules.LinearLR, start_factor=0.25, total_iters=3)
        assert seen == torchs(linear, 7, lr=2.0)

    def test_a_cosine_falls_to_a_tenth(self) -> None:
        seen = rates(ScheduleSpec("lambda_cosine", cosine_anneal=True), 20, lr=2.0)
        cosine = partial(torch_schedules.CosineAnnealingLR, T_max=20, eta_min=0.2)
        assert_close(seen, torchs(cosine, 20, lr=2.0), rtol=1e-12, atol=0)

    def test_warm_up_and_cosine(self) -> None:
        spec = ScheduleSpec("lambda_cosine", warmup_steps=5, cosine_anneal=True, max_steps=15)
        seen = rates(spec, 20)
        assert seen[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
        cosine = partial(torch_schedules.CosineAnnealingLR, T_max=10, eta_min=0.1)
        assert_close(seen[5:16], torchs(cosine, 11), rtol=1e-12, atol=0)
        assert seen[16:] == [0.1] * 4

    def test_the_length_is_the_runs_unless_it_is_given(self) -> None:
        free = rates(ScheduleSpec("lambda_cosine", cosine_anneal=True), 10)
        bound = rates(ScheduleSpec("lambda_cosine", cosine_anneal=True, max_steps=10), 10)
        other = rates(ScheduleSpec("lambda_cosine", cosine_anneal=True, max_steps=99), 10)
        assert free == bound != other

    def test_it_pickles(self) -> None:
        for spec in (
            ScheduleSpec("lambda_cosine", warmup_steps=3),
            ScheduleSpec(torch_schedules.StepLR, step_size=2),
        ):
            assert rates(pickle.loads(pickle.dumps(spec)), 6) == rates(spec, 6)

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: ScheduleSpec("cosine"), "lambda_cosine"),
            (lambda: ScheduleSpec("lambda_cosine", warmup=3), "warmup"),
            (lambda: ScheduleSpec("lambda_cosine", warmup_steps=-1), "warmup_steps=-1"),
            (lambda: ScheduleSpec(torch_schedules.StepLR), "step_size"),
            (lambda: ScheduleSpec(torch_schedules.StepLR, step_size=1, gama=2), "gama"),
            (lambda: ScheduleSpec(torch_schedules.ReduceLROnPlateau), "loss"),
            (lambda: ScheduleSpec(SGD), "scheduler class"),  # type: ignore[arg-type]
        ],
    )
    def test_what_it_cannot_be_is_refused_at_once(self, make: Any, says: str) -> None:
        with pytest.raises(SettingsError, match=says):
            make()


class TestInner:
    """The inner step of all nodes of a process."""

    def test_each_node_is_clipped_by_its_own_norm(self) -> None:
        small, large = parameters(3), parameters(3)
        small[0].grad = torch.tensor([0.3, 0.0, 0.4])
        large[0].grad = torch.tensor([30.0, 0.0, 40.0])
        start = small[0].detach().clone()
        Inner(OptimSpec(SGD, lr=1.0), max_norm=5.0).build([small, large], 1).step()
        assert_close(start - small[0].detach(), torch.tensor([0.3, 0.0, 0.4]))
        assert_close(start - large[0].detach(), torch.tensor([3.0, 0.0, 4.0]))

    def test_the_schedule_advances_with_the_steps(self) -> None:
        spec = Inner(OptimSpec(SGD, lr=1.0), ScheduleSpec("lambda_cosine", warmup_steps=2))
        inner = spec.build([parameters(1)], 9)
        seen = [inner.lr]
        inner.step()
        assert [*seen, inner.lr] == [0.5, 1.0]

    def test_many_nodes_step_as_each_alone(self) -> None:
        nodes = [parameters(3, 17) for _ in range(3)]
        for number, node in enumerate(nodes):
            for p in node:
                p.grad.mul_(number + 1)
        alone = [[nn.Parameter(p.detach().clone()) for p in node] for node in nodes]
        together = Inner(max_norm=0.5).build(nodes, 1)
        for node, mine in zip(nodes, alone, strict=True):
            for p, q in zip(node, mine, strict=True):
                q.grad = p.grad.clone()
            Inner(max_norm=0.5).build([mine], 1).step()
        together.step()
        for node, mine in zip(nodes, alone, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(node, mine, strict=True))

    def test_a_healed_node_goes_on_like_its_donor(self) -> None:
        nodes = [parameters(3), parameters(3)]
        nodes[1][0].grad = -nodes[1][0].grad
        inner = Inner(OptimSpec(AdamW, lr=0.1)).build(nodes, 9)
        inner.step()
        with torch.no_grad():
            nodes[1][0].copy_(nodes[0][0])
        inner.heal(1, 0)
        nodes[1][0].grad = nodes[0][0].grad.clone()
        inner.step()
        assert torch.equal(nodes[0][0], nodes[1][0])
        first, second = inner.node_state(0)[0], inner.node_state(1)[0]
        assert first["exp_avg"].data_ptr() != second["exp_avg"].data_ptr()

    def test_a_donor_that_never_stepped_leaves_no_state(self) -> None:
        nodes = [parameters(3), parameters(3)]
        nodes[0][0].grad = None
        inner = Inner().build(nodes, 9)
        inner.step()
        inner.heal(1, 0)
        assert inner.node_state(1) == [{}]

    def test_state_saved_goes_on(self) -> None:
        spec = Inner(
            OptimSpec(AdamW, lr=0.1), ScheduleSpec("lambda_cosine", warmup_steps=5), max_norm=1.0
        )
        whole = [parameters(4), parameters(4)]
        steady = spec.build(whole, 9)
        cut = [parameters(4), parameters(4)]
        first = spec.build(cut, 9)
        for _ in range(3):
            steady.step()
            first.step()
        second = spec.build(cut, 9)
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        for _ in range(3):
            steady.step()
            second.step()
        assert second.lr == steady.lr
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole, cut, strict=True))

    def test_parameters_that_fused_kernels_would_spoil_are_refused(self) -> None:
        bent = nn.Parameter(torch.ones(3, 4).T)
        with pytest.raises(SettingsError, match=r"\(4, 3\) is not contiguous"):
            Inner().build([[bent]], 1)

    @pytest.mark.parametrize("norm", [0, -1.0, float("nan")])
    def test_a_norm_that_lets_nothing_pass_is_refused(self, norm: float) -> None:
        with pytest.raises(SettingsError, match="max_norm"):
            Inner(max_norm=norm)
