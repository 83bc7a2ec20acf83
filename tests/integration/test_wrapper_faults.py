"""The doors when something goes wrong around a round: all groups still end equal."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from world import Group, World

from torchft.errors import DiscardedTooOften, MismatchError, StateDictError
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager
from torchft.process_group import FakeProcessGroupWrapper

# torch loads its compiler when a process makes its first optimizer: once, before the groups fork.
torch.optim.SGD([torch.zeros(1)], lr=0.1)


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()


def synchronous(group: Group, **options: Any) -> Manager:
    """Only the doors' own state travels."""
    defaults = {"load_state_dict": None, "state_dict": None, "min_replica_size": 2}
    return group.manager(use_async_quorum=False, **defaults, **options)


def test_tensors_with_gaps_are_averaged_by_their_elements(tmp_path: Path) -> None:
    def story(group: Group) -> Any:
        manager = group.manager(min_replica_size=2)
        square = torch.zeros(4, 4)
        square[:, 1] = group.number + 1.0
        manager.start_quorum()
        manager.allreduce(square[:, 1]).wait()
        _, (zeros, ones) = manager.allgather(torch.full((4, 4), float(group.number))[:, 1])
        assert manager.should_commit()
        return square.tolist(), zeros.tolist(), ones.tolist()

    one, two = World(tmp_path, min_replicas=2).run(story, story)
    assert one == two == ([[0.0, 1.5, 0.0, 0.0]] * 4, [0.0] * 4, [1.0] * 4)


@pytest.mark.parametrize("backup", [True, False], ids=["backup", "no backup"])
def test_local_sgd_starts_all_groups_from_equal_weights(tmp_path: Path, backup: bool) -> None:
    def story(group: Group) -> list[float]:
        model, manager = linear(seed=group.number), synchronous(group)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with LocalSGD(manager, model, inner, 2, backup=backup):
            return model.weight.flatten().tolist()

    one, two = World(tmp_path, min_replicas=2).run(story, story)
    assert one == two


def test_a_state_dict_may_name_what_the_context_binds(tmp_path: Path) -> None:
    """Then the groups meet before the first forward pass, and begin with equal weights."""

    def story(group: Group) -> Any:
        model = linear(seed=group.number)
        diloco: DiLoCo

        def state_dict() -> Any:
            return {"model": model.state_dict(), "shared": diloco.shared_state_dict()}

        def load_state_dict(state: Any) -> None:
            model.load_state_dict(state["model"])

        manager = group.manager(
            state_dict=state_dict, load_state_dict=load_state_dict, min_replica_size=2
        )
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = torch.optim.SGD(model.parameters(), lr=0.7)
        began: list[list[float]] = []
        with DiLoCo(manager, [model], inner, outer, 2) as diloco:
            model.register_forward_pre_hook(lambda *_: began.append(model.weight.tolist()))
            train(model, inner, 4)
        return began[0], manager.current_step(), model.weight.tolist()

    one, two = World(tmp_path, min_replicas=2).run(story, story)
    assert one == two
    assert one[1] == 2


def test_a_state_that_can_never_be_read_ends_all_groups_before_training(tmp_path: Path) -> None:
    def story(group: Group) -> str:
        model = linear(seed=group.number)

        def state_dict() -> Any:
            raise KeyError("ema")

        manager = group.manager(
            state_dict=state_dict, load_state_dict=lambda _: None, min_replica_size=2
        )
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = torch.optim.SGD(model.parameters(), lr=0.7)
        with (
            pytest.raises((StateDictError, DiscardedTooOften)) as raised,
            DiLoCo(manager, [model], inner, outer, 2),
        ):
            train(model, inner, 4)
        return str(raised.value)

    for error in World(tmp_path, min_replicas=2).run(story, story):
        assert "KeyError: 'ema'" in error and "mend its state_dict" in error


def test_who_missed_the_last_outer_step_gets_the_weights_too_when_all_settle(
    tmp_path: Path,
) -> None:
    def story(group: Group) -> Any:
        model, manager = linear(seed=0), synchronous(group)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = torch.optim.SGD(model.parameters(), lr=0.7)
        with DiLoCo(manager, [model], inner, outer, 2):
            train(model, inner, 4)
            if group.number == 0:  # as if the last collective had failed for it alone
                manager.load_state_dict({"step": 1, "batches_committed": 2})
                nn.init.zeros_(model.weight)
        return manager.final_sync(), manager.current_step(), model.weight.flatten().tolist()

    one, two = World(tmp_path, min_replicas=2).run(story, story)
    assert one == two
    assert one[:2] == (True, 2)


def test_a_group_heals_from_donors_that_train_on_meanwhile(tmp_path: Path) -> None:
    elements = 4_000_000  # fetching them takes longer than an inner step

    def train_large(group: Group, steps_before: str) -> Any:
        model = nn.Linear(elements, 1, bias=False)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        outer = torch.optim.SGD(model.parameters(), lr=0.7)
        if steps_before:
            group.world.wait(steps_before)
        manager = group.manager(
            use_async_quorum=False,
            load_state_dict=inner.load_state_dict,
            state_dict=inner.state_dict,
            max_retries=0,  # not one round is discarded
        )
        model.weight.grad = torch.ones_like(model.weight)
        with DiLoCo(manager, [model], inner, outer, 6, fragment_sync_delay=4):
            while manager.current_step() < 2:
                inner.step()
            group.world.happen("two rounds")
            while manager.num_participants() < 2:
                inner.step()
        return manager.current_step()

    story = train_large
    one, two = World(tmp_path).run(
        lambda group: story(group, ""), lambda group: story(group, "two rounds")
    )
    assert one == two


def test_a_group_with_another_schedule_is_told_so_before_anything_is_averaged(
    tmp_path: Path,
) -> None:
    def story(group: Group) -> str:
        model = linear(seed=0)
        manager = synchronous(group, quorum_timeout=timedelta(seconds=5))
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = torch.optim.SGD(model.parameters(), lr=0.7)
        raised = MismatchError if group.number else TimeoutError  # nobody is left to train with
        with (
            pytest.raises(raised) as refused,
            DiLoCo(manager, [model], inner, outer, sync_every=2 + group.number),
        ):
            pass
        return str(refused.value)

    _, said = World(tmp_path, min_replicas=2).run(story, story)
    assert "sync_every is 3 here and 2 there" in said


def test_a_group_that_cannot_apply_what_was_committed_heals_from_the_others(
    tmp_path: Path,
) -> None:
    def story(group: Group) -> Any:
        model, manager = linear(seed=0), synchronous(group)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9)
        take_the_step = outer.step
        taken = []

        def fails_the_second_time(closure: None = None) -> None:
            taken.append(1)
            if group.number == 0 and len(taken) == 2:
                raise RuntimeError("out of memory")
            take_the_step(closure)

        outer.step = fails_the_second_time  # type: ignore[method-assign, assignment]
        with DiLoCo(manager, [model], inner, outer, 2):
            for _ in range(8):
                with suppress(RuntimeError):
                    train(model, inner, 1)
        return manager.current_step(), model.weight.flatten().tolist()

    one, two = World(tmp_path, min_replicas=2).run(story, story)
    assert one == two


def test_an_average_that_fails_while_the_inner_steps_go_on_costs_its_round(tmp_path: Path) -> None:
    """An old failing that must not come back: with a delay between the all-reduce and its use, the
    round was committed though the all-reduce had failed."""

    def story(group: Group) -> Any:
        pg = FakeProcessGroupWrapper(group.pg)
        model, manager = linear(seed=0), synchronous(group, pg=pg)
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9)
        with DiLoCo(manager, [model], inner, outer, 4, fragment_sync_delay=2):
            start = model.weight.tolist()
            pg.report_future_error(RuntimeError("the network broke"))
            train(model, inner, 4)
            assert manager.current_step() == 0
            assert model.weight.tolist() == start
            train(model, inner, 4)
            assert model.weight.tolist() != start
        return manager.current_step(), model.weight.tolist()

    one, two = World(tmp_path, min_replicas=2).run(story, story)
    assert one == two
    assert one[0] == 1
