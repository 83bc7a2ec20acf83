"""Optimizers that look at more than one number: each node, and the outer step, as if alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.optimizers import GlobalClip, Lars, LateClip, Noisy, Prodigy, TwoGroups
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from torchft.errors import SettingsError
from torchft.simulator.events import Dies, Joins
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import Simulation, run_stacked
from torchft.strategies import (
    DiLoCoRecipe,
    DiLoCoStrategy,
    Inner,
    LocalSGDRecipe,
    OptimSpec,
    ScheduleSpec,
    Strategy,
)
from torchft.strategies.parts.coupling import couples_nodes, sees_shapes

CPU = torch.device("cpu")
STEPS = 6


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(5, 7, bias=bias), nn.Linear(7, 3, bias=bias)

    def forward(self, batch: Any) -> Tensor:
        x, y = batch
        return functional.mse_loss(self.b(torch.tanh(self.a(x))), y)


def shard(rank: int, nodes: int, train: bool) -> Any:
    """Each node's gradients are of a size of its own, whatever the number of nodes."""
    draws = torch.Generator().manual_seed(rank)
    x, y = torch.randn(8 * STEPS, 5, generator=draws), torch.randn(8 * STEPS, 3, generator=draws)
    return torch.utils.data.TensorDataset(x * (1 + 3 * rank), y)


def experiment(strategy: Strategy, **settings: Any) -> Experiment:
    defaults: dict[str, Any] = {
        "model": Net(),
        "train_dataset": shard,
        "num_nodes": 4,
        "max_steps": STEPS,
        "batch_size": 8,
        "device": "cpu",
    }
    return Experiment(strategy=strategy, **{**defaults, **settings})


def alone_and_among(inner: Inner, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Node 0 by itself and among four, without a round."""
    found = []
    for nodes in (1, 4):
        strategy = Strategy([LocalSGDRecipe(STEPS + 1)], inner=inner)
        run = Simulation(experiment(strategy, num_nodes=nodes, **settings))
        while run.step < STEPS:
            run.train_step()
        found.append(run.nodes[0].model)
    return found[0], found[1]


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


INNERS = {
    "LARS": OptimSpec(Lars),
    "Prodigy": OptimSpec(Prodigy),
    "global clip": OptimSpec(GlobalClip),
    "late clip": OptimSpec(LateClip),
    "Adafactor": OptimSpec(torch.optim.Adafactor, lr=1e-2),
    "noise": OptimSpec(Noisy),
    "two groups": OptimSpec(TwoGroups, lr=1e-2, fused=True),
    "fused says it": OptimSpec(GlobalClip, fused=True),
    "tensor rate": OptimSpec(torch.optim.AdamW, lr=torch.tensor(1e-2), foreach=False),
    "AdamW": OptimSpec(torch.optim.AdamW, lr=1e-2),
}


@pytest.mark.parametrize("name", INNERS)
def test_a_node_among_four_ends_with_the_bits_of_a_node_alone(name: str) -> None:
    decay = ScheduleSpec(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    alone, among = alone_and_among(Inner(INNERS[name], decay, max_norm=2.0))
    assert same_bits(alone, among)
    assert not same_bits(alone, Net())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_steps_each_node_as_if_alone() -> None:
    inner = Inner(OptimSpec(torch.optim.Muon, lr=1e-2))
    assert same_bits(*alone_and_among(inner, model=Net(bias=False)))


def test_clipping_a_nodes_gradient_looks_at_no_other_node() -> None:
    assert same_bits(*alone_and_among(Inner(OptimSpec(torch.optim.SGD, lr=0.1), max_norm=0.01)))


@pytest.mark.parametrize("cls", [Lars, torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_what_steps_each_tensor_by_itself_may_step_all_nodes(cls: Any) -> None:
    assert not couples_nodes(OptimSpec(cls, lr=0.05).build, CPU)


@pytest.mark.parametrize("at", [1e-4, 1.0, 1e3, 1e8])
def test_a_norm_over_all_tensors_is_found_at_any_threshold(at: float) -> None:
    assert couples_nodes(OptimSpec(GlobalClip, at=at).build, CPU)


@pytest.mark.parametrize("cls", [Prodigy, LateClip])
def test_what_is_learned_over_all_tensors_is_found(cls: type[Optimizer]) -> None:
    assert couples_nodes(cls, CPU)


def test_only_a_fused_kernel_that_couples_nothing_steps_all_nodes() -> None:
    def shared(spec: OptimSpec) -> bool:
        nodes = [list(Net().parameters()) for _ in range(3)]
        return Inner(spec).build(nodes, 10).is_shared

    assert shared(OptimSpec(torch.optim.AdamW)) and shared(OptimSpec(torch.optim.SGD, lr=0.1))
    assert not shared(OptimSpec(torch.optim.RMSprop))  # nothing is gained: it has no such kernel
    assert not shared(OptimSpec(GlobalClip, fused=True))


def test_a_node_that_joins_gets_its_donors_learned_step_size() -> None:
    strategy = Strategy(
        [DiLoCoRecipe(OptimSpec(torch.optim.SGD, lr=0.7), 2)], inner=OptimSpec(Prodigy)
    )  # type: ignore[arg-type]
    run = Simulation(experiment(strategy, events=[Dies(node=2, step=1), Joins(node=2, step=3)]))
    while run.step < STEPS - 1:
        run.train_step()
        if run.result.heals:
            break
    run.peers.begin(run.step)
    (heal,) = run.result.heals
    steppers = [run.local.inner._steppers[node].optimizer for node in (2, heal.donor)]
    assert steppers[0] is not steppers[1]
    d = [one.param_groups[0]["d"] for one in steppers]
    assert d[0] > 1e-2
    assert run.local.lr == 0.1


def test_a_run_that_resumes_has_every_nodes_own_optimizer_back() -> None:
    def begun() -> Simulation:
        strategy = DiLoCoStrategy(
            OptimSpec(Prodigy), H=2, lr_scheduler="lambda_cosine", lr_scheduler_kwargs={}
        )
        return Simulation(experiment(strategy, num_nodes=3))

    whole, half = begun(), begun()
    for run, steps in ((whole, STEPS), (half, 3)):
        for _ in range(steps):
            run.train_step()
    resumed = begun()
    resumed.load_state_dict(half.state_dict())
    while resumed.step < STEPS:
        resumed.train_step()
    for node in range(3):
        assert same_bits(resumed.nodes[node].model, whole.nodes[node].model)


OUTERS: dict[str, Callable[..., Optimizer]] = {
    "LARS": Lars,
    "Adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "SGD": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=0.1),
    "global clip": GlobalClip,
}


@pytest.mark.parametrize("name", OUTERS)
def test_the_outer_step_is_that_of_the_models_own_parameters(name: str) -> None:
    make = OUTERS[name]
    inner = Inner(OptimSpec(torch.optim.SGD, lr=0.05))
    result = run_stacked(
        experiment(Strategy([DiLoCoRecipe(make, STEPS)], inner=inner), num_nodes=2)
    )
    trained = []
    for node in range(2):  # the same by hand
        run = Simulation(
            experiment(Strategy([LocalSGDRecipe(STEPS + 1)], inner=inner), num_nodes=2)
        )
        while run.step < STEPS:
            run.train_step()
        trained.append([p.detach().clone() for p in run.nodes[node].model.parameters()])
    start = Net()
    optimizer = make(list(start.parameters()))
    for p, one, two in zip(start.parameters(), *trained, strict=True):
        p.grad = ((p.detach() - one) + (p.detach() - two)) / 2
    optimizer.step()
    for mine, theirs in zip(result.models[1].parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_which_outer_optimizers_need_the_parameters_shapes() -> None:
    answers = {name: sees_shapes(make) for name, make in OUTERS.items()}
    assert answers == {
        "LARS": True,
        "Adafactor": True,
        "SGD": False,
        "Adam": False,
        "global clip": False,
    }


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_outer_muon_steps_matrices_and_refuses_a_bias() -> None:
    outer = OptimSpec(torch.optim.Muon, lr=0.1)
    done = run_stacked(
        experiment(DiLoCoStrategy("adamw", outer, H=3), model=Net(bias=False), num_nodes=2)
    )
    assert len(done.rounds) == 2
    with pytest.raises(SettingsError, match=r"Muon.*2D parameters"):
        run_stacked(experiment(DiLoCoStrategy("adamw", outer, H=3), num_nodes=2))


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_an_optimizer_that_wants_other_gradients_is_refused_before_the_first_step(
    where: str,
) -> None:
    sparse = OptimSpec(torch.optim.SparseAdam)
    optims = {"inner": (sparse, None), "outer": ("adamw", sparse)}[where]
    steps: list[Simulation] = []
    with pytest.raises(SettingsError, match=f"{where} optimizer SparseAdam cannot step: .*dense"):
        run_stacked(experiment(DiLoCoStrategy(*optims, H=2)), on_step=steps.append)
    assert not steps


def test_a_schedule_whose_arguments_are_of_a_wrong_kind_is_refused_before_the_first_step() -> None:
    steps: list[Simulation] = []
    decay = ScheduleSpec(torch.optim.lr_scheduler.StepLR, step_size="ten")
    with pytest.raises(SettingsError, match=r"StepLR.*'step_size': 'ten'.* cannot step"):
        run_stacked(
            experiment(Strategy([LocalSGDRecipe(2)], inner=Inner(schedule=decay))),
            on_step=steps.append,
        )
    assert not steps


def test_an_outer_optimizer_that_wants_the_loss_is_refused_before_the_first_step() -> None:
    with pytest.raises(SettingsError, match="outer optimizer LBFGS cannot step"):
        run_stacked(experiment(Strategy([DiLoCoRecipe(torch.optim.LBFGS, 2)], inner=Inner())))
