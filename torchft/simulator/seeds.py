"""All randomness of one node's step follows from (seed, node, step).

So nothing random has to be saved: a run that resumes, a node that heals, a replay and a real
process draw what they would have drawn anyway. Different nodes never share a dropout mask.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from torchft.seeds import seed64

__all__ = ["Generators", "kept_rng", "seed_everything", "seed_node"]

_MASK63 = (1 << 63) - 1


def seed_node(seed: int, node: int, step: int, device: torch.device) -> None:
    """Set Python's, numpy's and torch's generators, of the CPU and of `device`, for one node's
    step."""
    mixed = seed64(seed, node, step)
    seed_everything(mixed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(mixed)
    elif device.type == "mps":
        torch.mps.manual_seed(mixed & _MASK63)


def seed_everything(mixed: int) -> None:
    """Set torch's CPU generator, numpy's and Python's: what models and data sets may draw from."""
    torch.default_generator.manual_seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)
    random.seed(mixed)


@dataclass(frozen=True)
class Generators:
    """Where Python's, numpy's and torch's generators stand, of the CPU and of `device`."""

    device: torch.device
    torch_state: torch.Tensor
    numpy_state: Any
    python_state: Any
    device_state: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """The state of all generators at this moment."""
        on_device = None
        if device.type == "cuda":
            on_device = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            on_device = torch.mps.get_rng_state()
        return cls(
            device, torch.get_rng_state(), np.random.get_state(), random.getstate(), on_device
        )

    def restore(self) -> None:
        """Set all generators back to this state."""
        torch.set_rng_state(self.torch_state)
        np.random.set_state(self.numpy_state)
        random.setstate(self.python_state)
        if self.device_state is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.device_state, self.device)
        elif self.device_state is not None:
            torch.mps.set_rng_state(self.device_state)


@contextmanager
def kept_rng(device: torch.device) -> Iterator[None]:
    """Whatever is seeded and drawn inside, the caller's generators go on where they were."""
    kept = Generators.now(device)
    try:
        yield
    finally:
        kept.restore()
