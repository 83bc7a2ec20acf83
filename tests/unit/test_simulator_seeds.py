"""What a node draws follows from (seed, node, step)."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from torchft.seeds import seed64
from torchft.simulator.seeds import kept_rng, seed_everything, seed_node

CPU = torch.device("cpu")


def drawn(seed: int, node: int, step: int) -> Tensor:
    seed_node(seed, node, step, CPU)
    return torch.rand(8)


def test_no_two_nodes_or_steps_share_a_seed() -> None:
    seeds = {seed64(s, n, t) for s in range(3) for n in range(64) for t in range(200)}
    assert len(seeds) == 3 * 64 * 200
    # Not even where the numbers add up to the same.
    assert len({seed64(1, 2, 3), seed64(2, 1, 3), seed64(3, 2, 1), seed64(1, 3, 2)}) == 4


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert seed64(42, 0, 0) == 7138415436909018950
    assert seed64(-1, 7, 1000) == 15757034948959397931


def test_a_step_is_drawn_again_alike() -> None:
    first = drawn(1, 2, 3)
    assert torch.equal(drawn(1, 2, 3), first)
    assert not torch.equal(drawn(1, 3, 3), first)
    assert not torch.equal(drawn(1, 2, 4), first)
    assert not torch.equal(drawn(2, 2, 3), first)


def test_what_a_model_draws_from_python_and_numpy_follows_too() -> None:
    def draw(before: int) -> tuple[float, float]:
        seed_everything(before)
        seed_node(1, 2, 3, CPU)
        return float(np.random.rand()), random.random()

    assert draw(before=5) == draw(before=6)


def test_the_callers_generators_go_on_where_they_were() -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    seed_everything(5)
    draw()
    undisturbed = draw()
    seed_everything(5)
    draw()
    with kept_rng(CPU):
        seed_everything(6)
        inside = draw()
    assert draw() == undisturbed != inside
