"""Parameters that only some groups use in a step, and what makes a backward pass unusual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.errors import SettingsError
from torchft.optim import OptimizerWrapper

DOORS = [DistributedDataParallel, PureDistributedDataParallel]
TINY = 1e-5
"""MB: each parameter has a bucket of its own, more or less."""


class Experts(nn.Module):
    """Two branches, of which a batch takes one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2, 3)
        self.left, self.right = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, branch: str) -> Tensor:
        return getattr(self, branch)(self.first(x))


WAYS: list[Any] = [
    pytest.param(DistributedDataParallel, {}, id="DDP"),
    pytest.param(DistributedDataParallel, {"find_unused_parameters": True}, id="torch finds them"),
    pytest.param(DistributedDataParallel, {"find_unused_parameters": False}, id="not to be found"),
    pytest.param(DistributedDataParallel, {"static_graph": True}, id="static graph"),
    pytest.param(
        DistributedDataParallel,
        {"static_graph": True, "should_quantize": "fp32", "bucket_cap_mb": TINY},
        id="static graph, encoded",
    ),
    pytest.param(DistributedDataParallel, {"gradient_as_bucket_view": True}, id="bucket views"),
    pytest.param(DistributedDataParallel, {"bucket_cap_mb": TINY}, id="small buckets"),
    pytest.param(DistributedDataParallel, {"should_quantize": "fp32"}, id="encoded"),
    pytest.param(PureDistributedDataParallel, {}, id="plain"),
]


@pytest.mark.parametrize(("door", "options"), WAYS)
def test_a_branch_that_only_one_group_took_is_averaged_in_both(
    door: Callable[..., nn.Module], options: dict[str, Any]
) -> None:
    models = [Experts(), Experts()]

    def story(node: Node) -> list[list[Tensor]]:
        model, manager = models[node.rank], InProcessManager(node)
        wrapped = door(manager, model, **options)
        optimizer = OptimizerWrapper(
            manager, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        )
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(torch.ones(1, 2), ("left", "right")[node.rank]).sum().backward()
            assert model.idle.grad is not None
            seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            assert optimizer.step()
        return [*seen, [p.detach() for p in model.parameters()]]

    both = World(Script(2)).run(story)
    assert_close(both[0], both[1], rtol=0, atol=0)
    model = Experts()
    model(torch.ones(1, 2), "left").sum().backward()
    assert model.left.weight.grad is not None
    names = [name for name, _ in model.named_parameters()]
    assert_close(both[0][0][names.index("left.weight")], model.left.weight.grad / 2)
    assert not both[0][0][names.index("idle")].any()


class Deep(nn.Module):
    """Its middle is computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2, 4)
        self.middle = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.last = nn.Linear(4, 1)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        x = self.first(x)
        for layer in self.middle:
            x = torch.tanh(
                layer(x)
                if self.reentrant is None
                else checkpoint(layer, x, use_reentrant=self.reentrant)
            )
        return {"scores": [self.last(x)]}


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(
    ("door", "options", "averages"),
    [
        (DistributedDataParallel, {}, 1),
        (DistributedDataParallel, {"bucket_cap_mb": TINY}, None),
        (DistributedDataParallel, {"bucket_cap_mb": TINY, "should_quantize": "fp32"}, None),
        (DistributedDataParallel, {"static_graph": True}, 1),
        (PureDistributedDataParallel, {}, 10),
    ],
    ids=["DDP", "small buckets", "encoded", "static graph", "plain"],
)
def test_gradient_checkpointing_averages_once(
    door: Callable[..., nn.Module], options: dict[str, Any], averages: int | None, reentrant: bool
) -> None:
    def grads(model: nn.Module, wrapped: nn.Module, node: int) -> list[Tensor]:
        wrapped(torch.full((3, 2), node + 1.0))["scores"][0].sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    models = [Deep(reentrant), Deep(reentrant)]

    def story(node: Node) -> tuple[list[Tensor], int]:
        model, manager = models[node.rank], InProcessManager(node)
        wrapped = door(manager, model, **options)
        for _ in range(2):
            manager.start_quorum()
            model.zero_grad()
            found = grads(model, wrapped, node.rank)
            assert manager.should_commit()
        return found, len(manager.reductions)

    (one, sent), (two, _) = World(Script(2)).run(story).values()
    right = [grads(model, model, node) for node, model in enumerate([Deep(None), Deep(None)])]
    assert_close(one, two, rtol=0, atol=0)
    assert_close(one, [(a + b) / 2 for a, b in zip(*right, strict=True)])
    assert averages is None or sent == 2 * averages


@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=str)
def test_buckets_stay_as_they_were_cut(options: dict[str, Any]) -> None:
    """Torch cuts them anew after the first backward pass, in the order in which gradients came: a
    group that was restarted would average other ones than those that went on."""

    class TheOtherWayRound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3, 1), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    manager = InProcessManager(Node(World(Script(1)), 0, 1))
    wrapped = DistributedDataParallel(manager, TheOtherWayRound(), bucket_cap_mb=TINY, **options)
    layouts = []
    for _ in range(3):
        manager.start_quorum()
        manager.reductions.clear()
        wrapped(torch.ones(1, 2)).sum().backward()
        manager.should_commit()
        layouts.append(list(manager.reductions))
    assert len(layouts[0]) > 1
    assert layouts[0] == layouts[1] == layouts[2]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("module", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_refused_by_name_when_the_model_is_wrapped(
    door: Callable[..., nn.Module], module: Callable[..., nn.Module]
) -> None:
    manager = InProcessManager(Node(World(Script(1)), 0, 1))
    model = nn.ModuleDict({"words": module(10, 3, sparse=True), "last": nn.Linear(3, 1)})
    with pytest.raises(SettingsError, match=r"gradient of words\.weight is sparse.*sparse=False"):
        door(manager, model)
    model["words"].requires_grad_(False)
    door(manager, model)


@pytest.mark.parametrize("door", DOORS)
def test_a_sparse_gradient_that_nobody_announced_is_named_in_the_backward_pass(
    door: Callable[..., nn.Module],
) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Parameter(torch.ones(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.embedding(x, self.words, sparse=True)

    manager = InProcessManager(Node(World(Script(1)), 0, 1))
    wrapped = door(manager, Looks())
    manager.start_quorum()
    with pytest.raises(SettingsError, match="gradient of words is sparse"):
        wrapped(torch.tensor([1, 2])).sum().backward()
    assert not manager.should_commit()
