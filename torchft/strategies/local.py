"""What a strategy sees of local training: weights and gradients as a few flat tensors.

A fragment is some of the parameters. Its weights, and likewise its gradients, are seen as one flat
tensor `[rows, elements]` per dtype and device, most often a single one. `rows` is the number of
nodes that live here: 1 in a process of its own, N in the simulator.

    model parameters   a [3, 4]   b [4]   c [2, 2] bfloat16
    weights(whole)     [ [1, 16] float32: a then b,   [1, 4] bfloat16: c ]

Decided once, alike in every runtime: frozen parameters are not part of any fragment, a tied weight
is one slot, a missing gradient is zero. Buffers are outside of fragments (`buffers.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torchft.sharded import local_part

__all__ = ["Fragment", "Layout", "Local"]


@dataclass(frozen=True)
class Fragment:
    """Parameters that are synchronised at one time."""

    index: int
    parameters: tuple[int, ...]
    """Positions in the order of the model's parameters, rising."""


class Local(Protocol):
    """The weights and gradients of the nodes that live in this process.

    What `weights`, `delta` and `grads` return belongs to the caller until it is released: a real
    process copies, the simulator may show its own storage, and then nobody writes in it.
    """

    samples: Sequence[int] | None
    """How many samples each row trains on in an epoch; None: nobody said."""
    own_data: bool
    """Each node brings its own data, so that their samples may differ in number."""

    @property
    def rows(self) -> int:
        """How many nodes live in this process: the leading dimension."""
        ...

    @property
    def whole(self) -> Fragment:
        """The fragment that holds all parameters of the model."""
        ...

    def split(self, parts: int, pattern: str = "sequential") -> Sequence[Fragment]:
        """`parts` fragments that cover all parameters, as `fragments.cut` cuts them.

        Raises:
            SettingsError: there are fewer parameters than that, or no such pattern.
        """
        ...

    def weights(self, fragment: Fragment) -> list[Tensor]:
        """The parameters of a fragment, each `[rows, …]`."""
        ...

    def delta(self, fragment: Fragment, base: Sequence[Tensor]) -> list[Tensor]:
        """`base - weights` in the dtype of `base`, which is `[1, n]` and may lie on another device.
        Where weights have fewer digits, `base` is rounded to theirs first: so this is what they
        moved by since they were set to it."""
        ...

    def set_weights(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Write the parameters from `[1 or rows, n]`."""
        ...

    def grads(self, fragment: Fragment) -> list[Tensor]:
        """The gradients, zero where there is none."""
        ...

    def set_grads(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Write the gradients from `[1 or rows, n]`."""
        ...

    def select(self, fragment: Fragment, positions: Sequence[Tensor]) -> list[Tensor]:
        """Some of the parameters' elements, `[rows, k]` each: a copy. `positions` holds, for each
        flat tensor, int64 indices `[k]` into it."""
        ...

    def put(
        self, fragment: Fragment, positions: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Write some of the parameters' elements from `[1 or rows, k]`: the inverse of `select`."""
        ...

    def zero_grads(self) -> None:
        """Before a backward pass: no gradient is left from the one before."""
        ...

    def views(self, fragment: Fragment, flats: Sequence[Tensor]) -> list[Tensor]:
        """One view `[rows, *shape]` per parameter in `flats`, `[rows, n]`."""
        ...

    def named_views(self, fragment: Fragment, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameter name → its view in `flats`, `[1, n]`."""
        ...

    @property
    def written(self) -> Sequence[int]:
        """The rows that are written now."""
        ...

    def buffers(self) -> Sequence[Mapping[str, Tensor]]:
        """The persistent buffers of each row's model by name, themselves."""
        ...

    def inner_step(self) -> None:
        """The step of the inner optimizer, on all rows. No gradient counts as a zero one."""
        ...

    def inner_states(
        self, fragment: Fragment
    ) -> Mapping[tuple[int, int], MutableMapping[str, Any]]:
        """The inner optimizer's state of each parameter, by row and position: its own dicts, so
        that writing in them sets it. Of the rows that are written now.

        Raises:
            SettingsError: no optimizer with such state is known.
        """
        ...

    def release(self, tensors: Sequence[Tensor], *, reusable: bool) -> None:
        """The caller is done with what it got. Not `reusable`: something may still write there."""
        ...


@dataclass(frozen=True)
class _Slot:
    """Where one parameter lies."""

    flat: int
    start: int
    stop: int
    shape: torch.Size


class Layout:
    """Where each parameter of a fragment lies in the fragment's flat tensors."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.kinds: list[tuple[torch.dtype, torch.device]] = []
        self.sizes: list[int] = []
        self._slots: list[_Slot] = []
        for tensor in map(local_part, parameters):
            kind = (tensor.dtype, tensor.device)
            if kind not in self.kinds:
                self.kinds.append(kind)
                self.sizes.append(0)
            flat = self.kinds.index(kind)
            start = self.sizes[flat]
            self.sizes[flat] = start + tensor.numel()
            self._slots.append(_Slot(flat, start, self.sizes[flat], tensor.shape))

    def views(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """One view per parameter, in its shape, in the flat tensors `[1, n]`."""
        return [flats[s.flat][0, s.start : s.stop].view(s.shape) for s in self._slots]

    def row_views(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """One view per parameter, `[rows, *shape]`, in the flat tensors `[rows, n]`."""
        return [
            flats[s.flat][:, s.start : s.stop].view(flats[s.flat].shape[0], *s.shape)
            for s in self._slots
        ]
