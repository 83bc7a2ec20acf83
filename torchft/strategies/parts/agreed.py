"""Randomness that all nodes agree on without a word: functions of whole numbers alone.

A permutation here is never written out. Its value at a position is computed, by a small Feistel
cipher over the next power of four, walked on until it falls inside: part of it costs that part.

    permuted(10, 0, 5, seed) and permuted(10, 5, 10, seed)   →   0 … 9 in some order, each once
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchft.seeds import seed63

__all__ = ["generator", "permuted"]

_ROUNDS = 6


def generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU: its numbers are the same beside any device."""
    return torch.Generator().manual_seed(seed63(*numbers))


def permuted(numel: int, start: int, stop: int, *seed: int) -> Tensor:
    """Where positions `start` to `stop` of `numel` go: int64, each target once."""
    half = max(1, ((numel - 1).bit_length() + 1) // 2)
    keys = [seed63(*seed, turn) & 0x7FFFFFFF for turn in range(_ROUNDS)]
    at = _enciphered(torch.arange(start, stop, device="cpu"), half, keys)
    while (outside := (at >= numel).nonzero()[:, 0]).numel():
        at[outside] = _enciphered(at[outside], half, keys)
    return at


def _enciphered(x: Tensor, half: int, keys: list[int]) -> Tensor:
    mask = (1 << half) - 1
    left, right = x >> half, x & mask
    for key in keys:
        # Products stay below 2**63: the halves of an index have at most 32 bits.
        h = ((right ^ key) & 0x7FFFFFFF) * 0x5BD1E995
        h = ((h ^ (h >> 15)) & 0x7FFFFFFF) * 0x27D4EB2D
        left, right = right, left ^ ((h ^ (h >> 17)) & mask)
    return (left << half) | right
