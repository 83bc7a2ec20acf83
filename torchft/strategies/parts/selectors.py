"""Which elements of a tensor are meant in the i-th round: agreed by a seed, so nothing is sent.

Each selector is a function of (numel, iteration, seed) and returns positions, int64 `[k]`, each at
most once. It keeps no state and costs O(k), whatever the size of the tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchft.arguments import check_number
from torchft.strategies.parts.agreed import generator, permuted

__all__ = [
    "IndexSelector",
    "PartitionedIndexSelector",
    "RandomIndexSelector",
    "Selector",
    "ShuffledSequentialIndexSelector",
]


class Selector(Protocol):
    """Which elements of a tensor are meant in a round."""

    def __call__(self, numel: int, iteration: int, seed: int) -> Tensor:
        """Positions below `numel`."""
        ...


@dataclass(frozen=True)
class IndexSelector:
    """Selects all elements of a tensor in every round."""

    def __call__(self, numel: int, iteration: int, seed: int) -> Tensor:
        """0 … numel - 1."""
        return torch.arange(numel, device="cpu")


@dataclass(frozen=True)
class _Share:
    """Selectors of about a share `p` of all elements.

    Raises:
        SettingsError: `p` is not above 0 and up to 1.
    """

    p: float

    def __post_init__(self) -> None:
        check_number("p", self.p, above=0, most=1)

    def _parts(self, numel: int) -> int:
        return max(1, min(math.ceil(1 / self.p - 1e-9), numel))

    def _part(self, part: int, numel: int, *seed: int) -> Tensor:
        """Of a permutation cut into `_parts` pieces, one."""
        parts = self._parts(numel)
        return permuted(numel, numel * part // parts, numel * (part + 1) // parts, *seed)


@dataclass(frozen=True)
class RandomIndexSelector(_Share):
    """Each with probability `p`, anew in every round: Bernoulli.

    The gaps between successes are geometric, so only the successes are drawn.
    """

    def __call__(self, numel: int, iteration: int, seed: int) -> Tensor:
        """In rising order; none at all is possible."""
        draws, stop = generator(seed, iteration), -1
        drawn = [torch.empty(0, dtype=torch.int64, device="cpu")]
        while stop < numel - 1:
            left = (numel - stop) * self.p
            uniform = torch.rand(
                int(left + 4 * math.sqrt(left)) + 8,
                generator=draws,
                dtype=torch.float64,
                device="cpu",
            )
            gaps = (torch.log1p(-uniform) / _log1p(-self.p)).floor_().clamp_(max=numel)
            drawn.append((gaps.long() + 1).cumsum(0) + stop)
            stop = int(drawn[-1][-1])
        found = torch.cat(drawn)
        return found[found < numel]


@dataclass(frozen=True)
class ShuffledSequentialIndexSelector(_Share):
    """One random order for good, cut into ceil(1/p) chunks, which come in turn."""

    def __call__(self, numel: int, iteration: int, seed: int) -> Tensor:
        """Chunk number `iteration`, from the start again after the last."""
        return self._part(iteration % self._parts(numel), numel, seed)


@dataclass(frozen=True)
class PartitionedIndexSelector(_Share):
    """A random partition into ceil(1/p) parts, which come in turn; a new one after each walk."""

    def __call__(self, numel: int, iteration: int, seed: int) -> Tensor:
        """The next part of the present partition."""
        walk, part = divmod(iteration, self._parts(numel))
        return self._part(part, numel, seed, walk)


def _log1p(x: float) -> float:
    return math.log1p(x) if x > -1 else -math.inf
