"""`DistributedDataParallel` over a model that FSDP2 shards over the ranks of each group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import RANKS, Sharded, mesh_of_group, net, shard
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from world import Group, World

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.errors import NotFiniteError, SettingsError
from torchft.sharded import local_part
from torchft.sharded_ddp import ShardedDataParallel

SMALL = {"bucket_cap_mb": 1e-5}
"""Each parameter has a bucket of its own, more or less."""
GROUPS = 2


def _layers(group: Group) -> nn.Module:
    """No root: FSDP2 ends the backward pass of each layer by itself."""
    mesh, model = mesh_of_group(group), net()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    return model


def _rooted(group: Group) -> nn.Module:
    return shard(group, net())


WAYS: list[Any] = [
    pytest.param(_rooted, DistributedDataParallel, {}, id="one bucket"),
    pytest.param(_rooted, DistributedDataParallel, SMALL, id="small buckets"),
    pytest.param(_layers, DistributedDataParallel, SMALL, id="layers alone"),
    pytest.param(_rooted, DistributedDataParallel, {"should_quantize": "fp32"}, id="encoded"),
    pytest.param(_rooted, PureDistributedDataParallel, {}, id="plain"),
    pytest.param(_layers, PureDistributedDataParallel, {}, id="plain, layers alone"),
]


Loss = Callable[[nn.Module, int, int], Tensor]
"""Of a model, the number of a group and a rank in it."""


class Fixed(Sharded):
    """Both groups have met, with equal weights, and begin a step."""

    def __init__(self, group: Group, *args: Any, **options: Any) -> None:
        super().__init__(group, *args, **options)
        while self.manager.num_participants() < GROUPS:
            self.optimizer.zero_grad()
            self.optimizer.step()  # of zeros
        self.optimizer.zero_grad()

    def sample(self, turn: int = 0) -> Tensor:
        return _sample(self.group.number, self.group.rank, turn)

    def grads(self) -> dict[str, Tensor]:
        return {k: p.grad.full_tensor() for k, p in self.model.named_parameters()}

    def expected(self, loss: Loss) -> dict[str, Tensor]:
        """Gradients of the mean over all ranks of all groups."""
        model = nn.Sequential(*net())
        model.load_state_dict({k: v.full_tensor() for k, v in self.model.state_dict().items()})
        for number in range(GROUPS):
            for rank in range(RANKS):
                (loss(model, number, rank) / (GROUPS * RANKS)).backward()
        return {k: _zeros(p.grad, p) for k, p in model.named_parameters()}


def _zeros(grad: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if grad is None else grad


def _sample(number: int, rank: int, turn: int) -> Tensor:
    seed = 100 * turn + 10 * number + rank
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def _run(folder: Path, story: Callable[[Group], Any]) -> list[Any]:
    return World(folder, min_replicas=GROUPS).run(*[story] * GROUPS, ranks=RANKS)


@pytest.mark.parametrize(("make", "wrap", "options"), WAYS)
def test_gradients_are_the_mean_over_all_ranks_of_all_groups(
    tmp_path: Path,
    make: Callable[[Group], nn.Module],
    wrap: Callable[..., Any],
    options: dict[str, Any],
) -> None:
    def story(group: Group) -> list[Tensor]:
        one = Fixed(group, make, wrap=wrap, **options)
        expected = one.expected(lambda model, n, r: model(_sample(n, r, 0)).square().mean())
        one.wrapped(one.sample()).square().mean().backward()
        assert_close(one.grads(), expected)
        sent = one.manager.steps.begun("it").averages
        assert len(sent) <= len(list(one.model.parameters())), "each travels once"
        assert one.optimizer.step()
        return [local_part(p).clone() for p in one.model.parameters()]

    ends = _run(tmp_path, story)
    assert_close(ends[:RANKS], ends[RANKS:], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, SMALL], ids=["one bucket", "small buckets"])
def test_a_model_that_is_called_twice_before_the_backward_pass(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """FSDP2 reduces each gradient twice then."""

    def loss(model: nn.Module, number: int, rank: int) -> Tensor:
        first, second = (model(_sample(number, rank, turn)).square().mean() for turn in range(2))
        return first + second

    def story(group: Group) -> None:
        one = Fixed(group, **options)
        expected = one.expected(loss)
        loss(one.wrapped, group.number, group.rank).backward()
        assert_close(one.grads(), expected)
        assert one.optimizer.step()

    _run(tmp_path, story)


@pytest.mark.parametrize("how", ["every pass", "no_sync", "FSDP's own"])
def test_gradients_accumulate_over_passes(tmp_path: Path, how: str) -> None:
    def loss(model: nn.Module, number: int, rank: int, turn: int) -> Tensor:
        return model(_sample(number, rank, turn)).square().mean()

    def story(group: Group) -> None:
        one = Fixed(group, **SMALL)
        expected = one.expected(lambda model, n, r: loss(model, n, r, 0) + loss(model, n, r, 1))
        first = one.manager.steps.begun("it").averages
        if how == "no_sync":
            with one.wrapped.no_sync():
                loss(one.wrapped, group.number, group.rank, 0).backward()
            assert not first
        else:
            one.model.set_requires_gradient_sync(how == "every pass")
            loss(one.wrapped, group.number, group.rank, 0).backward()
            one.model.set_requires_gradient_sync(True)
        loss(one.wrapped, group.number, group.rank, 1).backward()
        assert_close(one.grads(), expected)
        assert one.optimizer.step()

    _run(tmp_path, story)


def test_what_was_accumulated_without_sync_is_averaged_before_the_vote(tmp_path: Path) -> None:
    def story(group: Group) -> None:
        one = Fixed(group)
        expected = one.expected(lambda model, n, r: model(_sample(n, r, 0)).square().mean())
        with one.wrapped.no_sync():
            one.wrapped(one.sample()).square().mean().backward()
        assert one.optimizer.step()
        assert_close(one.grads(), expected)

    _run(tmp_path, story)


def test_a_validation_pass_between_two_steps_changes_nothing(tmp_path: Path) -> None:
    """FSDP2 leaves the gathered parameters of the root in the place of its shards."""

    def story(group: Group) -> str:
        one = Sharded(group)
        one.meet(GROUPS)
        while one.manager.current_step() < 6:
            one.step()
            with torch.no_grad():
                one.wrapped(one.batch())
        assert one.manager.errored() is None
        return one.digest()

    ends = _run(tmp_path, story)
    assert ends[:RANKS] == ends[RANKS:]


def test_a_layer_that_only_one_group_used_is_averaged_in_both(tmp_path: Path) -> None:
    def loss(model: nn.Module, number: int, rank: int) -> Tensor:
        return Branches.forward(model, _sample(number, rank, 0), number).square().mean()

    class Branches(nn.Sequential):
        def forward(self, value: Tensor, number: int) -> Tensor:
            for layer in self if number == 0 else list(self)[:2]:
                value = layer(value)
            return value

    def make(group: Group) -> nn.Module:
        mesh, model = mesh_of_group(group), Branches(*net())
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def story(group: Group) -> None:
        one = Fixed(group, make, **SMALL)
        expected = one.expected(loss)
        one.wrapped(one.sample(), group.number).square().mean().backward()
        assert_close(one.grads(), expected)
        assert one.optimizer.step()

    _run(tmp_path, story)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_quantised_shards_are_equal_in_all_groups(tmp_path: Path, codec: str) -> None:
    def story(group: Group) -> str:
        one = Sharded(group, should_quantize=codec)
        one.meet(GROUPS)
        return one.until(8)

    ends = _run(tmp_path, story)
    assert ends[:RANKS] == ends[RANKS:]


def test_nan_on_one_rank_discards_the_step_on_all_and_is_named(tmp_path: Path) -> None:
    def story(group: Group) -> str:
        one = Fixed(group)
        before = one.digest()
        sample = one.sample()
        if group.number == 1 and group.rank == 0:
            sample[0, 0] = float("nan")
        one.wrapped(sample).square().mean().backward()
        assert not one.optimizer.step()
        error = one.manager.errored()
        assert error is not None
        assert isinstance(error.original_exception, NotFiniteError)
        first = "4.bias" if group.rank == 0 else "2.bias"  # of the last layer rank 1 has nothing
        assert f"1 of them in {first}" in str(error.original_exception)
        assert one.digest() == before
        return one.until(one.manager.current_step() + 2)

    ends = _run(tmp_path, story)
    assert ends[:RANKS] == ends[RANKS:]


def test_layers_that_are_unfrozen_later_are_averaged(tmp_path: Path) -> None:
    def make(group: Group) -> nn.Module:
        model = net()
        model[0].requires_grad_(False)
        mesh = mesh_of_group(group)
        fully_shard(model[0], mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def story(group: Group) -> str:
        one = Sharded(group, make)
        one.meet(GROUPS)
        before = local_part(one.model[0].weight).clone()
        one.until(one.manager.current_step() + 2)
        assert torch.equal(local_part(one.model[0].weight), before)
        one.model[0].requires_grad_(True)
        one.until(one.manager.current_step() + 2)
        if before.numel():
            assert not torch.equal(local_part(one.model[0].weight), before)
        return one.digest()

    ends = _run(tmp_path, story)
    assert ends[:RANKS] == ends[RANKS:]


def test_what_says_how_torchs_reducer_works_is_taken_and_the_rest_is_refused(
    tmp_path: Path,
) -> None:
    def story(group: Group) -> None:
        manager, model = group.manager(use_async_quorum=False), shard(group, net())
        made = DistributedDataParallel(manager, model, static_graph=True, broadcast_buffers=False)
        assert type(made) is ShardedDataParallel
        with pytest.raises(SettingsError, match="device_ids cannot be given with a sharded module"):
            DistributedDataParallel(manager, model, device_ids=[0])
        with pytest.raises(SettingsError, match="bucket_cap_mb=0"):
            DistributedDataParallel(manager, model, bucket_cap_mb=0)

        class Mine(DistributedDataParallel):
            pass

        with pytest.raises(SettingsError, match="Mine cannot wrap DTensors"):
            Mine(manager, model)

    World(tmp_path).run(story, ranks=RANKS)
