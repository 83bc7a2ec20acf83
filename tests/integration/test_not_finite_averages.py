"""NaN and infinity in one group's numbers, on real groups: all discard that step, and go on."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.threads import Group, groups
from torch import Tensor, nn
from torch.distributed import ReduceOp

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.errors import NotFiniteError
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper

NAN, INF = float("nan"), float("inf")
STEPS, BAD = 4, 1
"""How many steps, and in which of them, from 0, group 0 has the bad number."""


class ByHand(nn.Module):
    """Gradients that the training loop averages itself."""

    def __init__(self, manager: Manager, module: nn.Module) -> None:
        super().__init__()
        self.module, self.manager = module, manager

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def average(self) -> None:
        works = [self.manager.allreduce(p.grad, name=n) for n, p in self.module.named_parameters()]
        for work in works:
            work.wait()


def encoded(manager: Manager, module: nn.Module) -> nn.Module:
    return DistributedDataParallel(manager, module, should_quantize="int8")


FRONTS: dict[str, Callable[..., nn.Module]] = {
    "DDP": DistributedDataParallel,
    "Pure DDP": PureDistributedDataParallel,
    "int8": encoded,
    "by hand": ByHand,
}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def train(group: Group, front: Callable[..., nn.Module], bad: float, **options: Any) -> Any:
    model = net()
    manager = group.manager(
        load_state_dict=model.load_state_dict, state_dict=model.state_dict, max_retries=0, **options
    )
    wrapped = front(manager, model)
    optimizer = OptimizerWrapper(manager, torch.optim.AdamW(model.parameters(), lr=0.1))
    committed, quorums, said = [], set(), None
    for step in range(STEPS):
        optimizer.zero_grad()
        poison = bad if group.number == 0 and step == BAD else 1.0
        wrapped(torch.ones(2, 2) * poison).mean().backward()
        if isinstance(wrapped, ByHand):
            wrapped.average()
        quorums.add(manager.steps.begun("the test").plan.quorum_id)
        said = said or manager.errored()
        committed.append(optimizer.step())
    return committed, len(quorums), said, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(("front", "bad"), [*((f, NAN) for f in FRONTS), ("DDP", INF)])
def test_all_discard_the_step_and_go_on_in_the_same_quorum(front: str, bad: float) -> None:
    results = groups(2, lambda group: train(group, FRONTS[front], bad))
    for committed, quorums, said, weights in results:
        assert committed == [step != BAD for step in range(STEPS)]
        assert quorums == 1
        assert isinstance(said.original_exception, NotFiniteError)
        # The bucket that arrived first, by its first parameter.
        assert re.search(r"of them in [01]\.(weight|bias), the first", str(said.original_exception))
        for mine, theirs in zip(weights, results[0][3], strict=True):
            assert mine.isfinite().all() and torch.equal(mine, theirs)


def test_a_job_that_wants_to_commit_them_says_so() -> None:
    results = groups(
        2, lambda group: train(group, DistributedDataParallel, NAN, check_finite=False)
    )
    assert [committed for committed, *_ in results] == [[True] * STEPS] * 2


def test_groups_that_judge_differently_are_refused() -> None:
    def story(group: Group) -> str:
        manager = group.manager(check_finite=group.number == 0)
        manager.start_quorum()
        manager.allreduce(torch.ones(1)).wait()
        manager.should_commit()
        return ""

    with pytest.raises(Exception, match="check_finite is"):
        groups(2, story)


def one_step(group: Group, communicate: Callable[[Manager, bool], object]) -> bool:
    manager = group.manager()
    manager.start_quorum()
    communicate(manager, group.number == 0)
    return manager.should_commit()


@pytest.mark.parametrize(
    ("op", "value", "commits"),
    [
        (ReduceOp.SUM, NAN, False),
        (ReduceOp.SUM, INF, False),
        (ReduceOp.MAX, INF, True),  # as a mask has it, or the least of nothing
        (ReduceOp.SUM, 3e38, False),  # finite at each, and not their sum
        (ReduceOp.AVG, 1e38, True),  # a sum of numbers overflows that are finite
    ],
    ids=str,
)
def test_a_sum_is_judged_and_a_maximum_is_not(op: Any, value: float, commits: bool) -> None:
    def communicate(manager: Manager, first: bool) -> None:
        manager.allreduce(torch.full((8,), value), reduce_op=op).wait()

    assert groups(2, lambda group: one_step(group, communicate)) == [commits] * 2


def test_what_is_gathered_and_what_is_whole_is_not_judged() -> None:
    def communicate(manager: Manager, first: bool) -> None:
        manager.allgather(torch.full((8,), NAN))[0].wait()
        manager.allreduce(torch.ones(8, dtype=torch.int64), reduce_op=ReduceOp.SUM).wait()

    assert groups(2, lambda group: one_step(group, communicate)) == [True] * 2


@pytest.mark.parametrize("average", ["ordered_mean", "int8"])
def test_an_average_that_nobody_waited_for_is_judged_at_the_vote(average: str) -> None:
    def communicate(manager: Manager, first: bool) -> None:
        tensor = torch.full((300,), NAN if first else 1.0)
        if average == "ordered_mean":
            manager.ordered_mean(tensor)
        else:
            manager.allreduce(tensor, should_quantize=average)

    assert groups(2, lambda group: one_step(group, communicate)) == [False] * 2


def test_nan_in_the_shard_of_one_rank_is_no_failure_for_the_group() -> None:
    """The other rank of each group sees nothing of it, and says so to nobody but its own group."""

    def story(group: Group) -> tuple[list[bool], int, int]:
        manager = group.manager(max_retries=0, use_async_quorum=False)
        committed, quorums = [], set()
        for step in range(STEPS):
            manager.start_quorum()
            bad = step == BAD and group.number == 0 and group.rank == 0
            manager.allreduce(torch.full((4,), NAN if bad else 1.0)).wait()
            quorums.add(manager.steps.begun("the test").plan.quorum_id)
            committed.append(manager.should_commit())
        return committed, len(quorums), manager.current_step()

    results = groups(2, story, ranks=2)
    assert results == [([step != BAD for step in range(STEPS)], 1, STEPS - 1)] * 4


def with_a_nan_gradient(
    group: Group, door: Callable[..., Any], *, use_async_quorum: bool = False
) -> Any:
    """A group's inner optimizer takes a NaN into its moments in one step of sixteen."""
    model = net()
    manager = group.manager(
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        max_retries=0,
        use_async_quorum=use_async_quorum,
    )
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    quorums = set()
    with door(manager, model, inner):
        for step in range(16):
            inner.zero_grad()
            poison = NAN if group.number == 0 and step == 5 else 1.0
            (model(torch.ones(2, 2)).mean() * poison).backward()
            inner.step()
            quorums.add(manager.steps.begun("the test").plan.quorum_id)
    counts = {int(state["step"]) for state in inner.state.values()}
    return manager.current_step(), len(quorums), counts, [p.detach() for p in model.parameters()]


def diloco(manager: Manager, model: nn.Module, inner: Any, **options: Any) -> DiLoCo:
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    return DiLoCo(manager, [model], inner, outer, 4, **options)


DOORS: dict[str, Callable[..., Any]] = {
    "LocalSGD": lambda manager, model, inner: LocalSGD(manager, model, inner, 4),
    "DiLoCo": diloco,
    "DiLoCo, int8": partial(diloco, should_quantize="int8"),
    "Streaming": partial(diloco, fragments=2, fragment_sync_delay=1),
}


@pytest.mark.parametrize(
    ("door", "background"), [*((door, False) for door in DOORS), ("Streaming", True)]
)
def test_one_nan_costs_local_training_one_round(door: str, background: bool) -> None:
    results = groups(
        2, lambda group: with_a_nan_gradient(group, DOORS[door], use_async_quorum=background)
    )
    # 16 steps of H = 4; a fragment's lost round is made up for by the others'.
    least = 3 if door != "Streaming" else 5
    for number, (rounds, quorums, counts, weights) in enumerate(results):
        assert rounds >= least
        assert quorums == 1
        assert (counts == {16}) == (number == 1), "only where it came from the moments begin anew"
        assert all(w.isfinite().all() for w in weights)
