"""The doors among real groups: right numbers, a kill in mid-run, a heal, equal digests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.peers import Script
from helpers.reference import INNER, OUTER, Kind, reference
from helpers.scripts import TinyScript
from helpers.tiny import Tiny, backward, digest
from torch import Tensor
from torch.testing import assert_close
from world import KILLED, Group, World

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.errors import MismatchError
from torchft.ledger import Bucket
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager
from torchft.optim import OptimizerWrapper

STEPS = 12

# torch loads its compiler when a process makes its first optimizer: once, before the groups fork.
INNER([torch.zeros(1)])


class Training(TinyScript):
    """A replica group's script."""

    def __init__(self, group: Group, *, seed: int = 0, **options: Any) -> None:
        super().__init__(group.number, seed)
        self.group = group
        self.manager: Manager = group.manager(
            use_async_quorum=False, state_dict=self.save, load_state_dict=self.load, **options
        )
        # From here on its heartbeat tells the lighthouse to wait for it.
        group.world.happen(f"{group.name} is up")


def local_sgd(t: Training) -> LocalSGD:
    return LocalSGD(t.manager, t.model, t.inner, 3)


def diloco(t: Training) -> DiLoCo:
    return DiLoCo(t.manager, [t.model], t.inner, OUTER(t.trained), 4)


def bucketised(t: Training) -> DiLoCo:
    return DiLoCo(t.manager, [t.model], t.inner, OUTER(t.trained), 4, use_bucketization=True)


def streaming(t: Training) -> DiLoCo:
    fragments = [t.model.first, t.model.second]
    outers = [OUTER([p for p in f.parameters() if p.requires_grad]) for f in fragments]
    return DiLoCo(t.manager, fragments, t.inner, outers, 4)


def delayed(t: Training) -> DiLoCo:
    return DiLoCo(
        t.manager,
        [t.model],
        t.inner,
        OUTER(t.trained),
        4,
        fragment_sync_delay=1,
        fragment_update_alpha=0.5,
    )


def in_flight(t: Training) -> DiLoCo:
    fragments = [t.model.first, t.model.second]
    return DiLoCo(
        t.manager,
        fragments,
        t.inner,
        OUTER(t.trained),
        6,
        fragment_sync_delay=5,
        fragment_update_alpha=0.5,
    )


@dataclass(frozen=True)
class Row:
    """A door and what it computes."""

    make: Callable[[Training], Any]
    kind: Kind


ROWS = {
    "LocalSGD": Row(local_sgd, Kind("local_sgd", every=3, skips_unused=True)),
    "DiLoCo": Row(diloco, Kind("diloco", every=4, skips_unused=True)),
    "DiLoCo in buckets": Row(bucketised, Kind("diloco", every=4, skips_unused=True)),
    "DiLoCo, 2 fragments": Row(streaming, Kind("diloco", every=4, fragments=2, skips_unused=True)),
    "DiLoCo, delayed, mixed": Row(
        delayed, Kind("diloco", every=4, delay=1, mix=0.5, skips_unused=True)
    ),
    "DiLoCo, both of 2 fragments in flight": Row(
        in_flight, Kind("diloco", every=6, fragments=2, delay=5, mix=0.5, skips_unused=True)
    ),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


@every_row
def test_groups_with_different_weights_start_equal_and_train_to_the_right_numbers(
    tmp_path: Path, row: Row
) -> None:
    def story(group: Group) -> Any:
        # Whichever is the first to be sorted gives the weights: its seed is the reference's.
        training = Training(group, seed=group.number, min_replica_size=2)
        with row.make(training):
            for number in range(1, STEPS + 1):
                training.step(number)
        return training.weights, training.manager.current_step()

    world = World(tmp_path, min_replicas=2)
    results = world.run(story, story)
    expected = reference(row.kind, Script(2), STEPS)
    assert results[0][1] == results[1][1] == STEPS // (row.kind.every // row.kind.fragments)
    for node, (weights, _) in enumerate(results):
        assert_close(weights, expected[node], rtol=0, atol=2e-6)


def halved(t: Training) -> DiLoCo:
    t.model.bfloat16()
    t.model.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
    return DiLoCo(t.manager, [t.model], t.inner, OUTER(t.trained), 4)


HALF = Row(halved, Kind("diloco", every=4))


@pytest.mark.parametrize(
    "row", [*ROWS.values(), pytest.param(HALF, marks=pytest.mark.slow)], ids=[*ROWS, "DiLoCo, bf16"]
)
def test_a_group_is_killed_in_an_outer_step_another_comes_and_all_end_equal(
    tmp_path: Path, row: Row
) -> None:
    rounds = 8

    def until(training: Training, door: Any, step: int) -> None:
        while training.manager.current_step() < step:
            training.step(door._strategy.clock.steps + 1)

    def all_are_up(group: Group) -> None:
        for name in ("group_0", "group_1", "group_2"):
            group.world.wait(f"{name} is up")

    def end(training: Training, door: Any) -> Any:
        until(training, door, rounds)
        state = list(door._recipe.state_dict().values())
        return digest(state), training.manager.num_participants()

    def survivor(group: Group) -> Any:
        training = Training(group)
        all_are_up(group)
        with row.make(training) as door:
            until(training, door, 5)
            group.world.wait("group_3 is up")
            return end(training, door)

    def victim(group: Group) -> None:
        training = Training(group)
        all_are_up(group)
        with row.make(training) as door:
            until(training, door, 2)
            peers = door._strategy._peers
            opened = peers.open

            def open_and_die(place: Any) -> None:
                opened(place)
                group.world.happen("killed")
                group.dies()

            peers.open = open_and_die
            until(training, door, rounds)

    def newcomer(group: Group) -> Any:
        group.world.wait("killed")
        training = Training(group, seed=9)
        with row.make(training) as door:
            return end(training, door)

    world = World(tmp_path, min_replicas=2)
    one, two, killed, new = world.run(survivor, survivor, victim, newcomer)
    assert killed == KILLED
    assert one == two == new
    assert one[1] == 3


@pytest.mark.parametrize("door", [DistributedDataParallel, PureDistributedDataParallel])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_ddp_trains_to_the_right_numbers(
    tmp_path: Path, door: Callable[..., Any], asynchronous: bool
) -> None:
    def story(group: Group) -> list[Tensor]:
        model = Tiny(seed=group.number)
        trained = [p for p in model.parameters() if p.requires_grad]
        # Without weight decay: a parameter that nobody uses stands, whoever averages.
        inner = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
        manager = group.manager(
            use_async_quorum=asynchronous,
            min_replica_size=2,
            state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
            load_state_dict=lambda s: (
                model.load_state_dict(s["model"]),
                inner.load_state_dict(s["inner"]),
            ),
        )
        wrapped, optimizer = door(manager, model), OptimizerWrapper(manager, inner)
        for number in range(1, 6):
            optimizer.zero_grad()
            backward(wrapped, group.number, number)
            assert optimizer.step()
        return [p.detach().clone() for p in trained]

    world = World(tmp_path, min_replicas=2)
    one, two = world.run(story, story)
    assert_close(one, two, rtol=0, atol=0)
    assert_close(one, plain_sgd(groups=2, steps=5), rtol=0, atol=2e-6)


class Averaging:
    """A group whose gradients travel encoded."""

    def __init__(self, group: Group, door: Callable[..., Any], **options: Any) -> None:
        self.group, self.model = group, Tiny(seed=0)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        inner = torch.optim.SGD(self.trained, lr=0.1, momentum=0.9)
        self.manager = group.manager(use_async_quorum=False)
        self.wrapped = door(self.manager, self.model, **options)
        self.optimizer = OptimizerWrapper(self.manager, inner)
        group.world.happen(f"{group.name} is up")

    def step(self, number: int) -> bool:
        self.optimizer.zero_grad()
        backward(self.wrapped, self.group.number, number)
        return self.optimizer.step()

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.trained if p.grad is not None]

    def seconds(self, bucket: Bucket) -> float:
        return self.manager.ledger.snapshot().get(bucket, 0.0)


SMALL_BUCKETS = {"bucket_cap_mb": 0.0001}


@pytest.mark.parametrize(
    ("door", "options"),
    [
        (DistributedDataParallel, {}),
        (DistributedDataParallel, SMALL_BUCKETS),
        (PureDistributedDataParallel, {}),
    ],
    ids=["DDP", "DDP in small buckets", "plain"],
)
def test_encoded_gradients_are_equal_in_all_groups_and_nearly_right(
    tmp_path: Path, door: Callable[..., Any], options: dict[str, Any]
) -> None:
    def story(group: Group) -> Any:
        one = Averaging(group, door, should_quantize=True, **options)
        for name in ("group_0", "group_1"):
            group.world.wait(f"{name} is up")
        for number in range(1, 6):
            one.optimizer.zero_grad()
            before = one.seconds(Bucket.COMMUNICATE)
            backward(one.wrapped, group.number, number)
            assert one.seconds(Bucket.COMMUNICATE) > before  # waited for in the backward pass
            after_backward = digest(one.gradients)
            assert one.optimizer.step()
            assert digest(one.gradients) == after_backward
        return [p.detach().clone() for p in one.trained], group.pg.bytes_sent

    (one, sent), (two, _) = World(tmp_path, min_replicas=2).run(story, story)
    assert_close(one, two, rtol=0, atol=0)
    right = plain_sgd(groups=2, steps=5)
    assert_close(one, right, rtol=0, atol=0.02)
    assert any(not torch.equal(a, b) for a, b in zip(one, right, strict=True))
    numbers = sum(p.numel() for p in one)
    assert 5 * numbers < sent < 5 * 3 * numbers  # a byte each, and scales of short blocks


@pytest.mark.parametrize("door", [DistributedDataParallel, PureDistributedDataParallel])
def test_a_group_dies_while_gradients_travel_and_the_others_skip_that_step(
    tmp_path: Path, door: Callable[..., Any]
) -> None:
    def together(group: Group) -> Averaging:
        one = Averaging(group, door, should_quantize="int8")
        for name in ("group_0", "group_1", "group_2"):
            group.world.wait(f"{name} is up")
        return one

    def survivor(group: Group) -> Any:
        one = together(group)
        went = [one.step(number) for number in range(1, 5)]
        return went, digest([p.detach() for p in one.trained]), one.manager.num_participants()

    def victim(group: Group) -> None:
        one = together(group)
        assert one.step(1)
        reduce = one.manager.allreduce

        def reduce_and_die(*args: Any, **kwargs: Any) -> None:
            reduce(*args, **kwargs)
            group.dies()

        one.manager.allreduce = reduce_and_die  # type: ignore[assignment]
        one.step(2)

    one, two, killed = World(tmp_path, min_replicas=2).run(survivor, survivor, victim)
    assert killed == KILLED
    assert one == two
    # Mostly the second: on a busy machine the others may take one before the victim is back.
    assert one[0][0] and one[0].count(False) == 1 and one[0][-1]
    assert one[2] == 2


@pytest.mark.parametrize("door", [DistributedDataParallel, PureDistributedDataParallel])
def test_groups_that_encode_gradients_in_two_ways_are_told_before_anything_is_mixed(
    tmp_path: Path, door: Callable[..., Any]
) -> None:
    def story(group: Group) -> str:
        one = Averaging(group, door, should_quantize="int8" if group.number == 0 else False)
        try:
            one.optimizer.zero_grad()
            return str(one.manager.errored())
        except MismatchError as error:
            return str(error)
        finally:
            assert group.pg.bytes_sent == 0

    right, wrong = World(tmp_path, min_replicas=2).run(story, story)
    assert "codec is absent here and int8 there" in wrong
    assert "codec is int8 here and absent there" in right


def plain_sgd(*, groups: int, steps: int) -> list[Tensor]:
    """The same without torchft: the loss is the mean of the groups' losses."""
    model = Tiny(seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    for number in range(1, steps + 1):
        inner.zero_grad()
        for group in range(groups):
            backward(model, group, number)
        for p in trained:
            if p.grad is not None:
                p.grad /= groups
        inner.step()
    return [p.detach().clone() for p in trained]
