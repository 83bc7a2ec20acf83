"""Train alone for H inner steps, then average the weights. (Stich, arXiv 1805.09767.)

    w ← mean over the nodes of w        after every H-th inner step

Two nodes at 1.0 that reach 0.6 and 0.8 both go on from 0.7. It sends 1/H of what all-reduce does.
After a discarded round the weights go back to the last average, which costs a backup of 4 bytes a
parameter; without a backup they stand as they are. The state of the inner optimizer stays local,
always.

`weighting="samples"` weighs each node by the samples that it has (FedAvg's formula), instead of all
alike: nodes with 1 and 3 samples would go on from 0.75. That sends one number more.

Of weights in bf16 or fp16 the mean is fp32, unless `shared_dtype` says otherwise, and so is its
backup b. What the weights cannot hold of it is not lost: the next one is mean of w + (b - rounded
b), so that steps below the last place add up (`parts/precision.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchft.arguments import check_choice, check_integer
from torchft.renamed import renamed_arguments
from torchft.strategies.buffers import BUFFERS, LEFT
from torchft.strategies.local import Fragment
from torchft.strategies.parts.backup import Backup
from torchft.strategies.parts.precision import (
    SharedDtype,
    check_shared_dtype,
    lost_by_rounding,
    weights_as,
)
from torchft.strategies.parts.weighting import (
    EQUAL,
    SAMPLES,
    WEIGHTINGS,
    resolved,
    samples_of,
    unweighed,
    weighed,
)
from torchft.strategies.recipe import Recipe

__all__ = ["LocalSGDRecipe"]


class LocalSGDRecipe(Recipe):
    """Average the weights every `sync_every` inner steps; with one island, this is FedAvg."""

    @renamed_arguments(every="sync_every")
    def __init__(
        self,
        sync_every: int,
        *,
        backup: bool = True,
        weighting: str | None = EQUAL,
        buffers: str = LEFT,
        shared_dtype: SharedDtype = torch.float32,
        backup_device: torch.device | str | None = "cpu",
        pin_memory: bool = True,
    ) -> None:
        check_integer("sync_every", sync_every, least=1)
        self.buffers = check_choice("buffers", buffers, BUFFERS)
        self.weighting = check_choice("weighting", weighting, (None, *WEIGHTINGS))
        self.shared_dtype = check_shared_dtype(shared_dtype)
        self.sync_every = sync_every
        self.backup: Backup | None = None
        self._wants_backup = backup
        self._device, self._pin = backup_device, pin_memory

    def setup(self) -> None:
        """Remember the weights that all start from."""
        self.weighting = resolved(self.weighting, self.local, self.codec)
        if self._wants_backup:
            self.backup = Backup(
                self.local,
                self.local.whole,
                device=self._device,
                pin_memory=self._pin,
                dtype=self.shared_dtype,
            )

    def take_backup(self) -> None:
        """The weights as they are now are the last average."""
        if self.backup is not None:
            self.backup.take()

    def compared(self) -> dict[str, str]:
        """Also how the mean is weighed, if not equally."""
        how = {"weighting": SAMPLES} if self.weighting == SAMPLES else {}
        return {**super().compared(), **how}

    def settle_in(self) -> None:
        """Start from the last average, not from the donor's local weights."""
        if self.backup is not None:
            self.backup.restore()

    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], None]:
        """The weights, or with weighting by samples these times them, and them."""
        if self.weighting == EQUAL:
            return weights_as(self.local, fragment, self.shared_dtype), None
        weights = self.local.weights(fragment)
        sent = weighed(weights, samples_of(self.local))
        self.local.release(weights, reusable=True)
        return sent, None

    def named(self, fragment: Fragment, received: list[Tensor], draft: None) -> dict[str, Tensor]:
        """The averaged tensors by the names of their parameters."""
        return self.local.named_views(fragment, received)

    @torch.no_grad()
    def apply(self, fragment: Fragment, received: list[Tensor]) -> list[Tensor]:
        """The mean, and what the weights could not hold of the last one."""
        if self.weighting == SAMPLES:
            received = unweighed(received)
        if self.backup is None:
            return received
        before = zip(received, self.backup.flats, self.backup.own_dtypes, strict=True)
        lost = [(mean, lost_by_rounding(flat, own)) for mean, flat, own in before]
        return [mean if left is None else mean + left.to(mean.device) for mean, left in lost]

    def apply_locally(self, fragment: Fragment, update: list[Tensor], draft: None) -> None:
        """The mean weights are this node's weights, and the next thing to go back to."""
        self.local.set_weights(fragment, update)
        if self.backup is not None:
            self.backup.copy_(update)

    def discard(self, fragment: Fragment, draft: None) -> None:
        """Go back to the last average."""
        if self.backup is not None:
            self.backup.restore()

    def state_dict(self) -> dict[str, Any]:
        """The last average, or without a backup one row's weights, and the clock."""
        if self.backup is None and self.local.rows > 1:
            return {"inner_steps": self.clock.steps}  # rows differ, and their runtime heals them
        return {"inner_steps": self.clock.steps, "original_parameters": self._base().views()}

    def equal_state(self) -> dict[str, Any]:
        """The last average; without a backup each node has weights of its own."""
        return {} if self.backup is None else self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a donor's last average, or without a backup its weights."""
        if "original_parameters" in state:
            base = self._base()
            base.load(state["original_parameters"])
            if base is not self.backup:
                base.restore()
        self.clock.steps = state["inner_steps"]
        self.has_healed = True

    def _base(self) -> Backup:
        return self.backup or Backup(self.local, self.local.whole)
