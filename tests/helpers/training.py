"""What one node runs in the battery, and its rows: each a strategy and what it must compute.

A new strategy is a row here and its numbers in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from helpers.peers import Node
from helpers.reference import INNER, OUTER, Kind
from helpers.scripts import SavesModelAndInner
from helpers.tiny import Tiny, backward, digest
from torch import Tensor

from torchft.quantization import BFloat16, Float8, Int4, Int8
from torchft.seeds import seed63
from torchft.strategies import (
    AllReduceRecipe,
    Clock,
    DeMoRecipe,
    DiLoCoRecipe,
    FedAvgRecipe,
    LocalSGDRecipe,
    ModelLocal,
    RandomIndexSelector,
    Recipe,
    SpartaRecipe,
    Strategy,
    TopKRecipe,
)
from torchft.strategies.parts.outer import ModelOuter

__all__ = ["ROWS", "SEQUENTIAL", "STEPS", "STRIDED", "Row", "Training"]

STEPS = 24


@dataclass(frozen=True)
class Row:
    """A strategy, and what it must compute."""

    kind: Kind
    make: Callable[[ModelLocal], Recipe | list[Recipe]]
    bucket_bytes: int | None = None

    @property
    def gives_up_without_heal(self) -> bool:
        """A member that does not know what is sent now, or would keep the round open beyond its
        next attempt, spoils it for all."""
        return self.kind.fragments > 1 or self.kind.delay > 0 or self.kind.name == "sparta"

    @property
    def is_before(self) -> bool:
        """It communicates gradients."""
        return self.kind.name in ("all_reduce", "demo")


def with_model_outer(**options: Any) -> Callable[[ModelLocal], Recipe]:
    def make(local: ModelLocal) -> Recipe:
        outer = ModelOuter([OUTER(local.parameters)], keep_weights=options.get("mix", 0) > 0)
        return DiLoCoRecipe(outer, **options)

    return make


def draw_of_islands(step: int, participants: int) -> list[list[int]]:
    """What FedAvg draws."""
    recipe = FedAvgRecipe(3, island_size=2, seed=5)
    recipe.clock = Clock(step)
    return recipe.islands(participants)


def every_third(numel: int, iteration: int, seed: int) -> Tensor:
    """A selector of one's own."""
    return torch.arange(iteration % 3, numel, 3)


def a_third(turn: int, numel: int) -> Tensor:
    return every_third(numel, turn, 0)


def at_random(turn: int, numel: int) -> Tensor:
    return RandomIndexSelector(0.02)(numel, turn, seed63(7, 0))


# Tiny's blocks, in bytes of fp32 / 4: unused 3, first.0 42, first.2 56, second.0 7, second.2 24.
SEQUENTIAL = ((0, 1, 2), (3, 4, 5, 6, 7))
STRIDED = ((0, 3, 4), (1, 2, 5, 6, 7))

ROWS = {
    "all-reduce": Row(Kind("all_reduce"), lambda _: AllReduceRecipe()),
    "all-reduce in buckets": Row(Kind("all_reduce"), lambda _: AllReduceRecipe(), bucket_bytes=60),
    "all-reduce, fp8": Row(Kind("all_reduce", codec=Float8()), lambda _: AllReduceRecipe()),
    "LocalSGD, bf16": Row(
        Kind("local_sgd", every=3, codec=BFloat16()), lambda _: LocalSGDRecipe(3)
    ),
    "DiLoCo, int8": Row(Kind("diloco", every=4, codec=Int8()), lambda _: DiLoCoRecipe(OUTER, 4)),
    "DiLoCo, 2 fragments, int4": Row(
        Kind("diloco", every=4, fragments=2, codec=Int4(16)),
        lambda _: DiLoCoRecipe(OUTER, 4, fragments=2),
    ),
    "all-reduce, int8, error feedback": Row(
        Kind("all_reduce", codec=Int8(16), feedback=True),
        lambda _: AllReduceRecipe(error_feedback=True),
    ),
    "DiLoCo, int4, error feedback": Row(
        Kind("diloco", every=4, codec=Int4(16), feedback=True),
        lambda _: DiLoCoRecipe(OUTER, 4, error_feedback=True),
    ),
    "DiLoCo, 2 fragments, int4, error feedback": Row(
        Kind("diloco", every=4, fragments=2, codec=Int4(16), feedback=True),
        lambda _: DiLoCoRecipe(OUTER, 4, fragments=2, error_feedback=True),
    ),
    "DiLoCo, 2 fragments, delayed, int8, error feedback": Row(
        Kind("diloco", every=6, fragments=2, delay=2, mix=0.5, codec=Int8(16), feedback=True),
        with_model_outer(sync_every=6, fragments=2, delay=2, mix=0.5, error_feedback=True),
    ),
    "LocalSGD": Row(Kind("local_sgd", every=3), lambda _: LocalSGDRecipe(3)),
    "LocalSGD without backup": Row(
        Kind("local_sgd", every=3, backup=False), lambda _: LocalSGDRecipe(3, backup=False)
    ),
    "FedAvg": Row(Kind("local_sgd", every=3), lambda _: FedAvgRecipe(3)),
    "FedAvg in islands": Row(
        Kind("islands", every=3, islands=draw_of_islands),
        lambda _: FedAvgRecipe(3, island_size=2, seed=5),
    ),
    "DiLoCo": Row(Kind("diloco", every=4), lambda _: DiLoCoRecipe(OUTER, 4)),
    "DiLoCo, the model's outer": Row(Kind("diloco", every=4), with_model_outer(sync_every=4)),
    "DiLoCo in buckets": Row(
        Kind("diloco", every=4), lambda _: DiLoCoRecipe(OUTER, 4), bucket_bytes=36
    ),
    "DiLoCo, 2 fragments": Row(
        Kind("diloco", every=4, fragments=2), lambda _: DiLoCoRecipe(OUTER, 4, fragments=2)
    ),
    "DiLoCo, cut in 2": Row(
        Kind("diloco", every=4, fragments=2, cut=SEQUENTIAL),
        lambda _: DiLoCoRecipe(OUTER, 4, fragments=2),
    ),
    "DiLoCo, cut in 2, strided": Row(
        Kind("diloco", every=5, fragments=2, cut=STRIDED, delay=1, mix=0.5),
        lambda _: DiLoCoRecipe(OUTER, 5, fragments=2, pattern="strided", delay=1, mix=0.5),
    ),
    "DiLoCo, cut in 2, strided, the model's outer": Row(
        Kind("diloco", every=4, fragments=2, cut=STRIDED),
        with_model_outer(sync_every=4, fragments=2, pattern="strided"),
    ),
    "DiLoCo, 2 fragments, the model's outer": Row(
        Kind("diloco", every=4, fragments=2), with_model_outer(sync_every=4, fragments=2)
    ),
    "DiLoCo, mixed": Row(
        Kind("diloco", every=2, mix=0.25), lambda _: DiLoCoRecipe(OUTER, 2, mix=0.25)
    ),
    "DiLoCo, delayed, mixed": Row(
        Kind("diloco", every=4, delay=3, mix=0.25),
        lambda _: DiLoCoRecipe(OUTER, 4, delay=3, mix=0.25),
    ),
    "DiLoCo, 2 fragments, delayed, mixed": Row(
        Kind("diloco", every=6, fragments=2, delay=2, mix=0.5),
        with_model_outer(sync_every=6, fragments=2, delay=2, mix=0.5),
    ),
    "DiLoCo, 2 fragments in 5 steps": Row(
        Kind("diloco", every=5, fragments=2), lambda _: DiLoCoRecipe(OUTER, 5, fragments=2)
    ),
    "DiLoCo, 2 fragments in 5 steps, the longest delay": Row(
        Kind("diloco", every=5, fragments=2, delay=2),
        lambda _: DiLoCoRecipe(OUTER, 5, fragments=2, delay=2),
    ),
    "DiLoCo, 2 fragments, a round closes where the next opens": Row(
        Kind("diloco", every=6, fragments=2, delay=3, mix=0.5),
        with_model_outer(sync_every=6, fragments=2, delay=3, mix=0.5),
    ),
    "DiLoCo, both of 2 fragments in flight": Row(
        Kind("diloco", every=6, fragments=2, delay=5, mix=0.5),
        with_model_outer(sync_every=6, fragments=2, delay=5, mix=0.5),
    ),
    "DiLoCo, both of 2 fragments always in flight": Row(
        Kind("diloco", every=4, fragments=2, delay=4),
        lambda _: DiLoCoRecipe(OUTER, 4, fragments=2, delay=4),
    ),
    "DiLoCo, both of 2 fragments in flight, the inner state restored too": Row(
        Kind("diloco", every=5, fragments=2, delay=4, restores_inner=True),
        lambda _: DiLoCoRecipe(OUTER, 5, fragments=2, delay=4, inner_state="restored"),
    ),
    "DiLoCo, the inner state restored too": Row(
        Kind("diloco", every=4, restores_inner=True),
        lambda _: DiLoCoRecipe(OUTER, 4, inner_state="restored"),
    ),
    "DiLoCo, 2 fragments, delayed, the inner state restored too": Row(
        Kind("diloco", every=6, fragments=2, delay=2, restores_inner=True),
        with_model_outer(sync_every=6, fragments=2, delay=2, inner_state="restored"),
    ),
    "LocalSGD, buffers averaged": Row(
        Kind("local_sgd", every=3), lambda _: LocalSGDRecipe(3, buffers="averaged")
    ),
    "DiLoCo, 2 fragments, delayed, buffers copied": Row(
        Kind("diloco", every=6, fragments=2, delay=2),
        lambda _: DiLoCoRecipe(OUTER, 6, fragments=2, delay=2, buffers="copied"),
    ),
    "SPARTA": Row(
        Kind("sparta", share_every=2, subset=a_third), lambda _: SpartaRecipe(every_third, 2)
    ),
    "SPARTA, at random, often none": Row(
        Kind("sparta", share_every=1, subset=at_random),
        lambda _: SpartaRecipe(RandomIndexSelector(0.02), seed=7),
        bucket_bytes=8,
    ),
    "SPARTA-DiLoCo": Row(
        Kind("sparta", every=4, share_every=2, subset=a_third),
        lambda _: [SpartaRecipe(every_third, 2), DiLoCoRecipe(OUTER, 4)],
    ),
    "LocalSGD, weighed by samples": Row(
        Kind("local_sgd", every=3, weighed=True), lambda _: LocalSGDRecipe(3, weighting="samples")
    ),
    "DeMo": Row(
        Kind("demo", topk=3, chunk=8, decay=0.9),
        lambda _: DeMoRecipe(decay=0.9, topk=3, chunk=8, mean_over="members"),
    ),
    "DeMo, over senders": Row(
        Kind("demo", topk=3, chunk=8, decay=0.9, senders=True),
        lambda _: DeMoRecipe(decay=0.9, topk=3, chunk=8, mean_over="senders"),
    ),
    "top-k": Row(
        Kind("top_k", every=3, topk=5, chunk=16, decay=0.8),
        lambda _: TopKRecipe(OUTER, 3, topk=5, chunk=16, decay=0.8, mean_over="members"),
    ),
    "top-k of tensors, over senders": Row(
        Kind("top_k", every=3, topk=5, chunk=16, decay=0.8, senders=True, by_tensor=True),
        lambda _: TopKRecipe(
            OUTER, 3, topk=5, chunk=16, decay=0.8, mean_over="senders", chunks_of="tensor"
        ),
    ),
}


class Training(SavesModelAndInner):
    """What one node runs."""

    def __init__(self, row: Row, node: Node, *, seed: int = 0) -> None:
        self.node, self.row = node, row
        self.model = Tiny(seed)
        fragments = [self.model.first, self.model.second]
        modules = fragments if row.kind.fragments == 2 and not row.kind.cut else [self.model]
        self.inner = INNER([p for p in self.model.parameters() if p.requires_grad])
        self.local = ModelLocal(modules, self.inner)
        self.local.samples = [node.rank + 1]
        made = row.make(self.local)
        recipes = made if isinstance(made, list) else [made]
        self.recipe = recipes[0]
        for recipe in recipes:
            recipe.codec = row.kind.codec
        self.strategy = Strategy(recipes, bucket_bytes=row.bucket_bytes)
        self.strategy.bind(self.local, node)
        node.register(self.load, self.save)
        node.register(self.strategy.load_shared_state_dict, self.strategy.shared_state_dict)
        node.register(self.strategy.take_over, self.strategy.open_rounds)

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.local.parameters]

    @property
    def gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.clone() for p in self.local.parameters]

    def everything(self) -> str:
        own = [recipe.own for recipe in self.strategy.recipes]
        return digest([self.save(), self.strategy.shared_state_dict(), own, self.gradients])

    def backward(self) -> None:
        self.strategy.begin()
        self.inner.zero_grad()
        backward(self.model, self.node.rank, self.strategy.clock.steps + 1)
        for opened in self.node.open_rounds:
            opened.seen = self.node.watch() if self.node.watch else None

    def run(self, steps: int = STEPS) -> Training:
        if self.node.joins or self.node.script.opening:
            self.strategy.join()
        return self.go_on(steps)

    def go_on(self, steps: int) -> Training:
        while self.strategy.clock.steps < steps:
            self.backward()
            self.strategy.step()
        self.strategy.finish()
        return self
