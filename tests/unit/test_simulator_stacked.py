"""Nodes as rows of one matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.tiny import Tiny
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from torchft.errors import SettingsError
from torchft.simulator.seeds import kept_rng, seed_node
from torchft.simulator.stacked import StackedLocal
from torchft.strategies.inner import Inner
from torchft.strategies.lr_schedule import ScheduleSpec
from torchft.strategies.model_local import ModelLocal
from torchft.strategies.optim_spec import OptimSpec

CPU = torch.device("cpu")
INNER = Inner(
    OptimSpec(torch.optim.AdamW, lr=3e-3, weight_decay=0.1),
    ScheduleSpec("lambda_cosine", warmup_steps=3, cosine_anneal=True),
    max_norm=0.5,
)


class Odd(nn.Module):
    """Odd sizes, a tied weight, dropout, a parameter that nobody uses, a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(33, 61), nn.Linear(61, 61), nn.Linear(61, 61)
        self.c.weight = self.b.weight
        self.norm, self.batch = nn.LayerNorm(61), nn.BatchNorm1d(61)
        self.unused = nn.Parameter(torch.ones(5))
        self.out, self.drop = nn.Linear(61, 7), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.b(F.relu(self.a(x))))
        return self.out(self.drop(F.gelu(self.c(self.norm(x)))))


class Attention(nn.Module):
    """A tied embedding, attention with dropout, odd lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(57, 44), nn.LayerNorm(44)
        self.qkv, self.o = nn.Linear(44, 132), nn.Linear(44, 44)
        self.head = nn.Linear(44, 57, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed((x.abs() * 10).long() % 57)
        q, k, v = (
            t.unflatten(-1, (4, 11)).transpose(1, 2) for t in self.qkv(self.norm(z)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
        return self.head(z + self.o(y.transpose(1, 2).flatten(2)))


def backward(model: nn.Module, node: int, step: int) -> None:
    seed_node(5, node, step, CPU)
    out = model(torch.randn(13, 33))
    F.cross_entropy(
        out.flatten(0, -2), torch.randint(out.shape[-1], out.shape[:-1]).flatten()
    ).backward()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def stacked(model: nn.Module, rows: int, inner: Inner = INNER) -> StackedLocal:
    return StackedLocal(model, rows, inner, max_steps=20)


def trained(local: StackedLocal, nodes: list[int], steps: int = 6) -> StackedLocal:
    """Row r is node `nodes[r]`."""
    for step in range(steps):
        local.zero_grads()
        for row, node in enumerate(nodes):
            backward(local.models[row], node, step)
        local.inner_step()
    return local


def trained_plainly(model: nn.Module, node: int, steps: int = 6) -> nn.Module:
    """By torch alone, but for the optimizer."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    inner = INNER.build([parameters], 20)
    local = ModelLocal([model], inner)
    for step in range(steps):
        local.zero_grads()
        backward(model, node, step)
        local.inner_step()
    return model


@pytest.fixture(autouse=True)
def _generators_are_kept():
    with kept_rng(CPU):
        yield


@pytest.mark.parametrize("make", [Odd, Attention])
class TestBits:
    def test_a_node_does_not_depend_on_the_number_of_rows(self, make: type[nn.Module]) -> None:
        many = trained(stacked(seeded(make), 12), list(range(12)))
        for node in (0, 5, 11):
            alone = trained(stacked(seeded(make), 1), [node])
            _assert_same_state(alone.models[0], many.models[node])
        assert len(set(many.weights(many.whole)[0].sum(1).tolist())) == 12

    def test_a_node_is_what_plain_torch_makes_of_it(self, make: type[nn.Module]) -> None:
        many = trained(stacked(seeded(make), 3), [0, 1, 2])
        for node in range(3):
            _assert_same_state(trained_plainly(seeded(make), node), many.models[node])


def _assert_same_state(one: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, state[name]), name


class TestStorage:
    def test_parameters_and_gradients_are_views_into_the_rows(self) -> None:
        local = stacked(Tiny(), 3)
        (weights,), (grads,) = local.weights(local.whole), local.grads(local.whole)
        weights[1] = 7.0
        backward_of = local.models[1]
        assert all(bool((p == 7).all()) for p in backward_of.parameters() if p.requires_grad)
        assert not (weights[[0, 2]] == 7).any()
        (backward_of(torch.ones(4, 5)) ** 2).mean().backward()
        assert grads[1].abs().sum() > 0
        assert not grads[[0, 2]].any()

    def test_a_tied_weight_is_one_slot_and_stays_tied(self) -> None:
        local = stacked(Tiny(), 2)
        assert local.weights(local.whole)[0].shape == (
            2,
            ModelLocal([Tiny()]).layout(local.whole).sizes[0],
        )
        assert local.models[1].second[0].weight is local.models[1].first[2].weight

    def test_what_is_not_used_has_a_zero_gradient(self) -> None:
        local = stacked(Tiny(), 2)
        local.grads(local.whole)[0].fill_(3.0)
        local.zero_grads()
        local.models[0](torch.ones(4, 5)).sum().backward()
        grads = local.views(local.whole, local.grads(local.whole))
        assert grads[local.names.index("first.unused")].tolist() == [[0, 0, 0], [0, 0, 0]]

    def test_the_optimizer_decays_what_nobody_used(self) -> None:
        local = stacked(Tiny(), 2)
        local.grads(local.whole)[0].fill_(3.0)
        local.zero_grads()
        before = local.models[0].first.unused.detach().clone()
        local.models[0](torch.ones(4, 5)).sum().backward()
        local.inner_step()
        after = local.models[0].first.unused
        assert (after.abs() < before.abs()).all()  # as with a gradient of zero

    def test_gradients_come_home_when_a_strategy_asks(self) -> None:
        local = stacked(Tiny(), 2)
        local.zero_grads()
        model = local.models[1]
        model(torch.ones(4, 5)).sum().backward()
        elsewhere = model.first[0].weight.grad.clone()
        grads = local.views(local.whole, local.grads(local.whole))
        row = grads[local.names.index("first.0.weight")][1]
        assert torch.equal(row, elsewhere)
        assert model.first[0].weight.grad.data_ptr() == row.data_ptr()
        assert model.first.unused.grad.tolist() == [0, 0, 0]

    def test_the_users_model_is_left_alone(self) -> None:
        model = Tiny()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        trained_on = stacked(model, 2)
        trained_on.weights(trained_on.whole)[0].fill_(1.0)
        assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_large_frozen_parameters_are_one_for_all_and_may_not_change(self) -> None:
        model = Tiny()
        model.second.frozen = nn.Parameter(torch.ones(500), requires_grad=False)
        local = stacked(model, 2)
        assert local.models[0].second.frozen is local.models[1].second.frozen
        local.frozen.check(1)
        local.models[0].second.frozen.data.mul_(2)
        with pytest.raises(SettingsError, match=r"second\.frozen.* by step 7.*register_buffer"):
            local.frozen.check(7)

    def test_small_ones_are_each_nodes_own_and_heal(self) -> None:
        local = stacked(Tiny(), 2)
        first, second = (model.second.frozen for model in local.models)
        before = second.clone()
        first.data.mul_(2)
        assert torch.equal(second, before)
        saved = local.state_dict()
        local.die(1)
        local.heal(1, 0)
        assert torch.equal(second, 2 * before)
        other = stacked(Tiny(), 2)
        other.load_state_dict(saved)
        assert torch.equal(other.models[1].second.frozen, 2 * before)

    def test_buffers_are_each_nodes_own(self) -> None:
        local = trained(stacked(seeded(Odd), 2), [0, 1])
        first, second = (m.batch for m in local.models)
        assert not torch.equal(first.running_mean, second.running_mean)
        first.num_batches_tracked += 1
        assert int(second.num_batches_tracked) == 6

    def test_at_the_end_a_model_does_not_hold_the_others(self) -> None:
        local = stacked(Tiny(), 3)
        local.weights(local.whole)[0][2] = 5.0
        local.move_out()
        weight = local.models[2].first[0].weight
        assert bool((weight == 5).all())
        assert weight.untyped_storage().nbytes() == weight.nbytes
        assert weight.grad is None


class TestDtypes:
    @staticmethod
    def mixed() -> nn.Module:
        model = Tiny()
        model.first[2].bias = nn.Parameter(torch.ones(7, dtype=torch.bfloat16))
        model.second[0].bias = nn.Parameter(torch.full((7,), 2.0, dtype=torch.float64))
        return model

    @pytest.mark.parametrize("parts", [1, 2, 3])
    def test_every_fragment_is_laid_out_as_in_a_real_process(self, parts: int) -> None:
        model = self.mixed()
        local, real = stacked(model, 2), ModelLocal([model])
        for mine, theirs in zip(local.split(parts), real.split(parts), strict=True):
            assert mine == theirs
            for seen, expected in zip(local.weights(mine), real.weights(theirs), strict=True):
                assert seen.dtype is expected.dtype
                assert torch.equal(seen[1:], expected)
            names = local.named_views(mine, [w[:1] for w in local.weights(mine)])
            assert names.keys() == real.named_views(theirs, real.weights(theirs)).keys()


class TestWriting:
    def test_from_one_row_for_all_or_a_row_for_each(self) -> None:
        local = stacked(Tiny(), 3)
        (flat,) = local.weights(local.whole)
        local.set_weights(local.whole, [torch.full((1, flat.shape[1]), 2.0)])
        assert bool((flat == 2).all())
        each = torch.arange(3.0)[:, None].expand_as(flat)
        local.set_weights(local.whole, [each])
        assert torch.equal(flat, each)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_only_some_rows(self, rows: int) -> None:
        local = stacked(Tiny(), 3)
        (flat,), (grads,) = local.weights(local.whole), local.grads(local.whole)
        before = flat.clone()
        values = torch.arange(float(rows))[:, None].expand(rows, flat.shape[1]) + 5
        with local.limited_to([1]):
            local.set_weights(local.whole, [values])
            local.set_grads(local.whole, [values])
        assert torch.equal(flat[[0, 2]], before[[0, 2]])
        assert set(flat[1].tolist()) == set(grads[1].tolist()) == {5.0 + (rows == 3)}
        assert not grads[[0, 2]].any()
        local.set_weights(local.whole, [values])
        assert flat[0, 0] == 5

    def test_single_elements(self) -> None:
        local = stacked(Tiny(), 3)
        (flat,) = local.weights(local.whole)
        at = torch.tensor([4, 0, 9])
        assert torch.equal(local.select(local.whole, [at])[0], flat[:, at])
        before = flat.clone()
        local.die(2)
        local.put(local.whole, [at], [torch.tensor([[1.0, 2.0, 3.0]])])
        assert flat[:2, at].tolist() == [[1, 2, 3]] * 2
        assert torch.equal(flat[2], before[2])
        rest = [i for i in range(flat.shape[1]) if i not in at.tolist()]
        assert torch.equal(flat[:, rest], before[:, rest])

    def test_a_delta_is_not_the_weights(self) -> None:
        local = stacked(Tiny(), 2)
        (flat,) = local.weights(local.whole)
        base = flat[:1].clone()
        flat[1] += 1
        (delta,) = local.delta(local.whole, [base])
        assert_close(delta[1], -torch.ones_like(delta[1]))
        delta.zero_()
        assert not torch.equal(flat[1], base[0])


class TestLives:
    def test_the_dead_are_neither_stepped_nor_written(self) -> None:
        local = trained(stacked(seeded(Odd), 3), [0, 1, 2], steps=2)
        local.die(1)
        before = {k: v.clone() for k, v in local.row_views(1).items()}
        for step in range(2):
            local.zero_grads()
            for row in local.alive:
                backward(local.models[row], row, step)
            local.inner_step()
        local.set_weights(local.whole, [torch.zeros_like(local.weights(local.whole)[0][:1])])
        assert_close(local.row_views(1), before, rtol=0, atol=0)
        assert local.alive == [0, 2]

    def test_who_heals_goes_on_as_its_donor_would(self) -> None:
        local = trained(stacked(seeded(Odd), 3), [0, 1, 2], steps=2)
        local.die(0)
        local.heal(0, 2)
        assert local.alive == [0, 1, 2]
        # Both see the donor's data from now on.
        trained(local, [2, 1, 2], steps=3)
        _assert_same_state(local.models[0], local.models[2])

    def test_it_goes_on_from_what_was_saved(self) -> None:
        one = trained(stacked(seeded(Odd), 3), [0, 1, 2], steps=2)
        one.die(1)
        saved = copy.deepcopy(one.state_dict())
        other = stacked(seeded(Odd), 3)
        other.load_state_dict(saved)
        assert other.alive == [0, 2]
        for local in (one, other):
            local.heal(1, 0)
            trained(local, [0, 1, 2], steps=2)
        for mine, theirs in zip(one.models, other.models, strict=True):
            _assert_same_state(mine, theirs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Flatten(), "no parameter that requires a gradient"),
        (nn.ParameterList([torch.zeros(2) * 1j]), "is torch.complex64: it cannot be averaged"),
        (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), "is not contiguous"),
    ],
)
def test_what_cannot_be_stacked_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        stacked(model, 2)
