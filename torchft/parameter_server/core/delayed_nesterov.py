"""Delayed Nesterov: momentum for submissions that come one by one.

    every submission:      w ← w - lr · g/N            d ← d + g
    every N-th of them:    m ← β·m + d/N               w ← w - lr · β·m         d ← 0

Each submission counts once, at once; the momentum moves once in N of them, by their mean, so it is
as smooth as one of a synchronous round. Four equal g = 1 with N = 4, lr = .7, β = .9 move
.7 + .7·.9 = 1.33, as one synchronous Nesterov step with their mean does. (Liu et al., arXiv
2401.09135, Algorithm 3 with c = 0.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchft.arguments import check_integer
from torchft.strategies.local import Fragment
from torchft.strategies.parts.outer import Flats

__all__ = ["DelayedNesterov"]


class DelayedNesterov:
    """An outer step over flat rows, as `FlatOuter`; `buffer` is N."""

    def __init__(self, *, lr: float, momentum: float, buffer: int) -> None:
        check_integer("buffer", buffer, least=1)
        self.lr, self.momentum, self.buffer = lr, momentum, buffer
        self._rows: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._momenta: list[Tensor] = []
        self._counts: list[int] = []

    def bind(self, fragments: Sequence[Fragment], backups: Sequence[Flats]) -> None:
        """Take the rows to be stepped, one a fragment, with sums and momenta of zero."""
        self._rows = [flat for backup in backups for flat in backup.flats]
        self._sums = [torch.zeros_like(row) for row in self._rows]
        self._momenta = [torch.zeros_like(row) for row in self._rows]
        self._counts = [0] * len(self._rows)

    @torch.no_grad()
    def step(self, fragment: Fragment, average: Sequence[Tensor]) -> None:
        """Step one fragment with one submission, fp32 `[1, n]`."""
        at, (delta,) = fragment.index, average
        self._rows[at].add_(delta, alpha=-self.lr / self.buffer)
        self._sums[at].add_(delta)
        self._counts[at] += 1
        if self._counts[at] >= self.buffer:
            momentum = self._momenta[at].mul_(self.momentum)
            momentum.add_(self._sums[at], alpha=1 / self.buffer)
            self._rows[at].add_(momentum, alpha=-self.lr * self.momentum)
            self._sums[at].zero_()
            self._counts[at] = 0

    def change(self, *, lr: float, momentum: float, nesterov: bool) -> None:
        """Use other settings from now on; the method is Nesterov's whatever `nesterov` says."""
        self.lr, self.momentum = lr, momentum

    def state_dict(self, fragment: Fragment) -> dict[str, Any]:
        """The sum, momentum and count of one fragment, not copied."""
        at = fragment.index
        return {"sum": self._sums[at], "momentum": self._momenta[at], "count": self._counts[at]}

    def load_state_dict(self, fragment: Fragment, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave for one fragment."""
        at = fragment.index
        self._sums[at].copy_(state["sum"])
        self._momenta[at].copy_(state["momentum"])
        self._counts[at] = state["count"]
