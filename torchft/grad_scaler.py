"""torch's GradScaler under steps that are voted on.

    scaler = torch.amp.GradScaler()
    optimizer = Optimizer(manager, AdamW(model.parameters()), scaler=scaler)
    ...
    scaler.scale(loss).backward()      # averages carry a group's infinity to all
    scaler.step(optimizer)             # votes, also where the scaler found an infinity
    scaler.update()

The scale must be equal in all groups, or their averages mean nothing. So it follows the steps, by a
rule that all groups can keep to:

    committed                       as `update` has it: a number further towards growth
    NaN or infinity in an average   falls, everywhere, whoever's scaler has seen it
    discarded for another reason    stays: what a scaler saw then was this group's own

It heals with the rest. A scaler that the optimizer is not given is only heeded.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer

from torchft.errors import NotFiniteError

if TYPE_CHECKING:
    from torch.amp import GradScaler

    from torchft.manager import Manager

__all__ = ["FollowedScaler", "Found", "unscale", "warn_of_stranger"]

State = dict[str, Any]

_registered: WeakKeyDictionary[Manager, list[GradScaler]] = WeakKeyDictionary()


class Found:
    """What a scaler that calls `step` tells the optimizer: `grad_scale` and `found_inf`, which it
    sets as attributes for the time of the call."""

    def __init__(self, optimizer: Optimizer) -> None:
        said = vars(optimizer)
        self.by_scaler = "found_inf" in said
        """Whether it is a scaler that calls."""
        self.infinity = self.by_scaler and bool(said["found_inf"])
        scale = said.get("grad_scale")
        self.scale = None if scale is None else float(scale)
        """What the gradients still have to be divided by; None: by nothing."""

    def error(self) -> NotFiniteError:
        """Why the step may not be taken."""
        return NotFiniteError(
            "GradScaler found NaN or infinity in the gradients: its first steps, and one now and "
            "then, are its search for a scale"
        )


def unscale(optimizer: Optimizer, scale: float) -> None:
    """Divide all gradients by `scale`, with the bits that GradScaler's own way has."""
    inverse = 1.0 / scale
    with torch.no_grad():
        for group in optimizer.param_groups:
            for grad in (p.grad for p in group["params"] if p.grad is not None):
                (grad._values() if grad.is_sparse else grad).mul_(inverse)


class FollowedScaler:
    """A scaler whose scale follows the steps of a manager, and heals."""

    def __init__(self, manager: Manager, scaler: GradScaler) -> None:
        self._manager, self._scaler = manager, scaler
        self._right: State | None = None
        """What its state must be when the next step begins; None: as it is."""
        known = _registered.setdefault(manager, [])
        if not any(one is scaler for one in known):  # the two optimizers of a GAN share one
            known.append(scaler)
            manager.register_state_dict_fn(
                f"GradScaler_{len(known)}", scaler.load_state_dict, scaler.state_dict
            )

    def begin(self) -> None:
        """A step begins, after `GradScaler.update` of the last one."""
        right, self._right = self._right, None
        if right is not None:
            self._scaler.load_state_dict(right)

    @property
    def scale(self) -> float:
        """What gradients are multiplied by now."""
        return float(self._scaler.get_scale())

    def voted(self, committed: bool) -> None:
        """The step has ended, before `GradScaler.update`."""
        if committed or not self._scaler.is_enabled():
            return
        before = self._scaler.state_dict()
        if self._manager.num_skipped():
            before = {
                **before,
                "scale": before["scale"] * before["backoff_factor"],
                "_growth_tracker": 0,
            }
        self._right = before


def warn_of_stranger() -> None:
    """A scaler calls that was not given."""
    warnings.warn(
        "this optimizer is stepped by a GradScaler that it does not know: a group that heals keeps "
        "its own scale, and its averages are wrong then. Give Optimizer(…, scaler=scaler)",
        stacklevel=4,
    )
