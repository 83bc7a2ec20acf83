"""All randomness of one node's step follows from (seed, node, step).

So nothing random has to be saved: a run that resumes, a node that heals, a replay and a real
process draw what they would have drawn anyway. Different nodes never share a dropout mask.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["kept_rng", "seed_everything", "seed_node", "seed_of"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def seed_of(seed: int, node: int, step: int) -> int:
    """64 bits that look unrelated for every seed, node and step."""
    return _mixed(_mixed(_mixed(seed) + node) + step)


def _mixed(value: int) -> int:
    """The finaliser of splitmix64."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def seed_node(seed: int, node: int, step: int, device: torch.device) -> None:
    """Set Python's, numpy's and torch's generators, of the CPU and of `device`, for one node's
    step."""
    mixed = seed_of(seed, node, step)
    seed_everything(mixed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(mixed)
    elif device.type == "mps":
        torch.mps.manual_seed(mixed & (_MASK >> 1))


def seed_everything(mixed: int) -> None:
    """Set torch's CPU generator, numpy's and Python's: what models and data sets may draw from."""
    torch.default_generator.manual_seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)
    random.seed(mixed)


@contextmanager
def kept_rng(device: torch.device) -> Iterator[None]:
    """Whatever is seeded and drawn inside, the caller's generators go on where they were."""
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_device = _device_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
        if device.type == "cuda" and on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        elif device.type == "mps" and on_device is not None:
            torch.mps.set_rng_state(on_device)


def _device_state(device: torch.device) -> torch.Tensor | None:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return None
