"""`exogym.aux.utils`: what scripts use of it."""

from __future__ import annotations

import torch

__all__ = ["get_device"]


def get_device() -> str:
    """The best device of this machine: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
