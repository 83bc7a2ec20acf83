"""A script's own `torch.set_default_dtype` and `torch.set_default_device`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["other_defaults"]


@contextmanager
def other_defaults() -> Iterator[None]:
    """Doubles on `meta`, which hold no numbers: a tensor that is made where they are is seen."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
