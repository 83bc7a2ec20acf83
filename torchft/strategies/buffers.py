"""What becomes of a model's buffers where its weights are synchronised: one of three choices.

    "left"        each node keeps its own, and nothing of them is sent; the default
    "averaged"    b ← mean over the nodes of b; of integers the nearest one, halves up
    "copied"      b ← that of the first node that takes part

Two nodes whose BatchNorm has running means of 0.2 and 0.4 and has counted 10 and 11 batches both go
on from 0.3 and 11 if they are averaged, from 0.2 and 10 if they are copied. Of booleans the mean is
what most say, True if they are even.

They ride in the round of the weights, whichever fragment it is about: sent when it opens, written
when it has committed. After a discarded round they stand, but for those that are NaN at a node: it
gets back the values of the last round that committed, from a copy. All of a node's travel as one
gathering, exactly, whatever the codec: each node sends (N-1) times their bytes. A NaN discards the
round as well; infinities pass, since masks have them. Only buffers of the state dict count: others
(persistent=False) are each node's own, always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from torchft.errors import NotFiniteError, SettingsError
from torchft.ordered import ordered_mean
from torchft.sharded import local_part
from torchft.strategies.local import Layout, Local

if TYPE_CHECKING:
    from torchft.peers import Handle, Round

__all__ = [
    "AVERAGED",
    "BUFFERS",
    "COPIED",
    "LEFT",
    "BufferBackup",
    "Buffers",
    "buffers_of",
    "check_means",
    "nan_buffers",
]

BUFFERS = LEFT, AVERAGED, COPIED = "left", "averaged", "copied"


def check_means(local: Local, how: str) -> None:
    """Before the first round: whatever is to be averaged has a mean.

    Raises:
        SettingsError: a buffer is complex.
    """
    for name, buffer in local.buffers()[0].items():
        if how == AVERAGED and buffer.is_complex():
            raise SettingsError(
                f"buffer {name} is {buffer.dtype}, and is not averaged: use buffers='{COPIED}'"
            )


def buffers_of(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """What the modules' state dicts have besides parameters, by name; what is shared once.

    These are the buffers themselves. A module may put another tensor in the place of one, so they
    are looked up anew for each round.
    """
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for index, top in enumerate(modules):
        for path, module in top.named_modules(prefix="" if len(modules) == 1 else str(index)):
            for name, buffer in module.named_buffers(recurse=False):
                lasts = name not in module._non_persistent_buffers_set
                if lasts and id(buffer) not in known and buffer.numel():
                    found[f"{path}.{name}" if path else name] = buffer
                    known.add(id(buffer))
    return found


class Buffers:
    """Those of one round, on their way."""

    def __init__(self, local: Local, how: str, handle: Handle) -> None:
        self._local, self._how, self._handle = local, how, handle
        self._received: list[Tensor] = []

    @classmethod
    def sent(cls, local: Local, how: str, peers_round: Round) -> Self:
        """Send them: one gathering of the round."""
        return cls(local, how, peers_round.gather(_read(local.buffers())))

    def received(self) -> list[Tensor]:
        """Wait for what the nodes sent: `[n, k]` for each dtype and device."""
        return self._handle.wait()

    @torch.no_grad()
    def wait(self) -> NotFiniteError | None:
        """Receive them. Returns why the round must come to nothing, equal at all nodes."""
        received = self.received()
        self._received = [_mean(of) if self._how == AVERAGED else of[:1] for of in received]
        names = self._local.buffers()[0]
        for name, value in zip(names, self._views(), strict=True):
            if (value.is_floating_point() or value.is_complex()) and bool(value.isnan().any()):
                return NotFiniteError(
                    f"buffer {name} would be NaN in all groups: look for the group whose data or "
                    "hardware is broken"
                )
        return None

    @torch.no_grad()
    def apply_locally(self, backup: BufferBackup) -> None:
        """Write what was received into the models here, and keep it in `backup`."""
        backup.keep(self._received)
        rows, views = self._local.buffers(), self._views()
        for row in self._local.written:
            for buffer, value in zip(rows[row].values(), views, strict=True):
                local_part(buffer).copy_(value)

    def _views(self) -> list[Tensor]:
        return Layout(self._local.buffers()[0].values()).views(self._received)


def nan_buffers(named: Mapping[str, Tensor]) -> list[str]:
    """The names of those that have a NaN in them. An infinity may be meant: masks have them."""
    return [
        name
        for name, buffer in named.items()
        if (buffer.is_floating_point() or buffer.is_complex()) and bool(buffer.isnan().any())
    ]


class BufferBackup:
    """One node's buffers, as all had them after the last round that committed; at first its own."""

    def __init__(self, local: Local, *, kept: bool) -> None:
        """`kept`: there are rounds about buffers; else nothing is copied, and none goes back."""
        self._local = local
        self._values = _read(local.buffers()[:1]) if kept and local.buffers()[0] else []

    def keep(self, values: list[Tensor]) -> None:
        """A round committed, and all have got these."""
        self._values = values

    @torch.no_grad()
    def restore(self) -> None:
        """Where a node that is written has NaN in a buffer, that one goes back."""
        if not self._values:
            return
        rows = self._local.buffers()
        views = dict(zip(rows[0], Layout(rows[0].values()).views(self._values), strict=True))
        for row in self._local.written:
            for name in nan_buffers(rows[row]):
                local_part(rows[row][name]).copy_(views[name])


@torch.no_grad()
def _read(rows: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """A copy of each node's: `[rows, n]` for each dtype and device, all on the first's device."""
    layout = Layout(rows[0].values())
    home = layout.kinds[0][1]
    flats = [
        torch.empty(len(rows), size, dtype=dtype, device=home)
        for size, (dtype, _) in zip(layout.sizes, layout.kinds, strict=True)
    ]
    for row, named in enumerate(rows):
        views = layout.views([flat[row : row + 1] for flat in flats])
        for view, buffer in zip(views, named.values(), strict=True):
            view.copy_(local_part(buffer))
    return flats


def _mean(rows: Tensor) -> Tensor:
    """`[n, k]` → `[1, k]`, in the same dtype; added in at least 32 bits."""
    if rows.is_floating_point():
        return ordered_mean(rows if rows.itemsize >= 4 else rows.float()).to(rows.dtype)
    total, nodes = rows.to(torch.int64).sum(0, keepdim=True), rows.shape[0]
    return (2 * total + nodes).div(2 * nodes, rounding_mode="floor").to(rows.dtype)
