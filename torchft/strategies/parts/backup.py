"""The weights of the last synchronisation: discarded rounds go back to them, deltas start there.

One flat tensor per dtype, on a device of choice. On the CPU, beside parameters on a GPU, it is
pinned so that it travels without blocking. `[1, n]`: all nodes share it. Its dtype may have more
digits than the parameters (`precision.py`): then they are set to it rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchft.devices import has_streams
from torchft.errors import HealError
from torchft.strategies.local import Fragment, Local
from torchft.strategies.parts.precision import shared_dtype_of

__all__ = ["Backup"]


class Backup:
    """A copy of one fragment's weights; `device` None keeps it beside the parameters, `dtype` None
    in their own dtype."""

    def __init__(
        self,
        local: Local,
        fragment: Fragment,
        *,
        device: torch.device | str | None = None,
        pin_memory: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.local = local
        self._fragment = fragment
        at = None if device is None else torch.device(device)
        weights = local.weights(fragment)
        self.own_dtypes = [w.dtype for w in weights]
        """Of the parameters that each flat tensor is of."""
        dtypes = [shared_dtype_of(own, dtype) for own in self.own_dtypes]
        self.flats = [
            _empty_beside(w[:1], at, kept_in, pin_memory=pin_memory)
            for w, kept_in in zip(weights, dtypes, strict=True)
        ]
        self.copy_(weights)
        local.release(weights, reusable=True)

    @property
    def is_wider(self) -> bool:
        """Some of it has more digits than the parameters can hold."""
        return self.own_dtypes != [flat.dtype for flat in self.flats]

    def take(self) -> None:
        """The parameters as they are now become the last synchronisation."""
        weights = self.local.weights(self._fragment)
        self.copy_(weights)
        self.local.release(weights, reusable=True)

    @torch.no_grad()
    def restore(self, rows: Sequence[int] | None = None) -> None:
        """The parameters go back to the last synchronisation; those of some rows, or of all."""
        if rows is None:
            self.local.set_weights(self._fragment, self.flats)
            return
        weights = self.local.weights(self._fragment)
        values = [weight.clone() for weight in weights]
        self.local.release(weights, reusable=True)
        for value, flat in zip(values, self.flats, strict=True):
            value[rows] = flat.to(value.device)
        self.local.set_weights(self._fragment, values)

    @torch.no_grad()
    def copy_(self, values: Sequence[Tensor]) -> None:
        """The first row of `values` becomes the last synchronisation."""
        for flat, value in zip(self.flats, values, strict=True):
            flat.copy_(value[:1])

    def views(self) -> dict[str, Tensor]:
        """Parameter name → its part of the backup, sharing storage."""
        return self.local.named_views(self._fragment, self.flats)

    def in_shape(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """One view per parameter of the fragment, in its shape, of tensors like `self.flats`."""
        return list(self.local.named_views(self._fragment, flats).values())

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over a donor's backup, whole or not at all.

        Raises:
            HealError: it is of another model.
        """
        views = self.views()
        for name, view in views.items():
            value = values.get(name)
            if value is None or value.shape != view.shape:
                seen = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise HealError(
                    f"the donor has {seen} for parameter {name} of shape {tuple(view.shape)}: "
                    "every group must train the same model"
                )
        for name, view in views.items():
            view.copy_(values[name])


def _empty_beside(
    weights: Tensor, device: torch.device | None, dtype: torch.dtype, *, pin_memory: bool
) -> Tensor:
    at = weights.device if device is None else device
    pinned = pin_memory and has_streams(weights.device) and at.type == "cpu"
    return torch.empty(weights.shape, dtype=dtype, device=at, pin_memory=pinned)
