"""Frozen parameters that all nodes of one process share, and that nobody may write into.

They are shared where copies would cost more than what is trained: a large model under an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import SettingsError

__all__ = ["SharedFrozen", "own_frozen"]

_FIRST_STEPS = 3


class SharedFrozen:
    """Those of `model`, by name; none where each node may have its own."""

    def __init__(self, model: nn.Module) -> None:
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.parameters: Mapping[str, nn.Parameter] = {} if _is_small(model) else frozen
        self._sums = {name: _sum(p) for name, p in self.parameters.items()}
        self._versions = self._versions_now()

    def memo(self) -> dict[int, Any]:
        """For `copy.deepcopy`, which leaves alone what is in it."""
        return {id(p): p for p in self.parameters.values()}

    def share(self, model: nn.Module) -> None:
        """Give these to a model that was made anew."""
        for name, p in model.named_parameters():
            if name in self.parameters:
                p.data = self.parameters[name].data

    def check_after(self, step: int) -> None:
        """After each step, counted from 0: torch counts most writes itself; for the others the
        values are summed after the first steps, and each time that their number has doubled.

        Raises:
            SettingsError: something has written into one; names it.
        """
        done = step + 1
        now = self._versions_now()
        if done <= _FIRST_STEPS or done & step == 0 or now != self._versions:
            self._versions = now
            self.check(done)

    def check(self, steps: int) -> None:
        """All of them, after so many steps. Raises SettingsError as `check_after` does."""
        for name, p in self.parameters.items():
            if _sum(p) != self._sums[name]:
                raise SettingsError(
                    f"parameter {name}, with requires_grad=False, was written into by step "
                    f"{steps}, and all nodes share such parameters, as they are larger than what "
                    "is trained: make what the model itself updates a buffer (register_buffer), "
                    "which each node has alone"
                )

    def _versions_now(self) -> list[int]:
        # What was made under inference_mode has no count, and refuses writes by itself.
        return [0 if p.is_inference() else p._version for p in self.parameters.values()]


def own_frozen(model: nn.Module) -> list[nn.Parameter]:
    """The frozen parameters that are a node's own, so that its model may write into them."""
    return [p for p in model.parameters() if not p.requires_grad] if _is_small(model) else []


def _is_small(model: nn.Module) -> bool:
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return frozen <= sum(p.nbytes for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def _sum(tensor: Tensor) -> str:
    """As text, so that NaN equals NaN."""
    return str(tensor.sum(dtype=torch.float32).item())
