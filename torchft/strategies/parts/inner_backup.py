"""The inner optimizer's state at the last synchronisation, which discarded rounds restore.

Moments and counters of each parameter of one fragment, on the backup's device: 8 bytes a parameter
for AdamW. What belongs to the optimizer as a whole, like its learning rate and schedule, goes on.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from torchft.finite import are_finite
from torchft.sharded import local_part
from torchft.strategies.local import Fragment, Local

__all__ = ["InnerBackup"]

Saved = dict[str, Any]


class InnerBackup:
    """A copy of the inner state of one fragment; `device` None keeps it beside the original."""

    def __init__(
        self, local: Local, fragment: Fragment, *, device: torch.device | str | None = None
    ) -> None:
        self._local, self._fragment, self._device = local, fragment, device
        self._saved: dict[tuple[int, int], Saved] = {}
        self.take()

    @torch.no_grad()
    def take(self) -> None:
        """The state as it is now is that of the last synchronisation, where it is finite: a NaN
        that came while the average travelled would come back with every no."""
        for at, state in self._local.inner_states(self._fragment).items():
            if not are_finite(local_part(v) for v in state.values() if isinstance(v, Tensor)):
                continue
            before = self._saved.get(at, {})
            self._saved[at] = {
                name: self._copy(value, before.get(name)) for name, value in state.items()
            }

    def _copy(self, value: Any, before: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        part = local_part(value)
        if isinstance(before, Tensor) and before.shape == part.shape:
            return before.copy_(part)
        device = part.device if self._device is None else self._device
        return part.to(device, copy=True)

    @torch.no_grad()
    def restore(self, rows: Collection[int] | None = None) -> None:
        """The state goes back to the last synchronisation; that of some rows, or of all."""
        for at, state in self._local.inner_states(self._fragment).items():
            if rows is not None and at[0] not in rows:
                continue
            saved = self._saved.get(at, {})
            for name in list(state.keys() - saved.keys()):
                del state[name]  # as before the first step
            for name, value in saved.items():
                if isinstance(value, Tensor) and isinstance(state.get(name), Tensor):
                    local_part(state[name]).copy_(value)
                else:
                    state[name] = value.clone() if isinstance(value, Tensor) else value

    def state_dict(self) -> dict[tuple[int, int], Saved]:
        """By row and position of the parameter."""
        return self._saved

    def load_state_dict(self, saved: dict[tuple[int, int], Saved]) -> None:
        """Go on from a state that `state_dict` returned."""
        self._saved = {
            at: {name: self._copy(value, None) for name, value in state.items()}
            for at, state in saved.items()
        }
