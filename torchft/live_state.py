"""The state that a joining group needs, registered by key, and when it may be read.

Optimizers hold the write side of a lock while they change parameters, donors the read side while
they collect what to offer: no group is ever given half an optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from torchft.checkpointing._rwlock import RWLock
from torchft.errors import HealError

__all__ = ["LiveState"]


@dataclass(frozen=True)
class _Functions:
    load: Callable[[Any], None]
    save: Callable[[], Any]


class LiveState:
    """What users registered, in order. `timeout` bounds the wait for the lock."""

    def __init__(self, timeout: timedelta) -> None:
        self.copies = False
        """Collect copies, because the state changes while it is being fetched."""
        self._functions: dict[str, _Functions] = {}
        self._lock = RWLock(timeout=timeout.total_seconds())
        self._readable = True

    def register(self, key: str, load: Callable[[Any], None], save: Callable[[], Any]) -> None:
        """AssertionError when `key` is registered already."""
        assert key not in self._functions, f"state {key!r} is registered already"
        self._functions[key] = _Functions(load, save)

    def allow_read(self) -> None:
        """The parameters are whole. Allowing twice is fine."""
        if not self._readable:
            self._readable = True
            self._lock.w_release()

    def disallow_read(self) -> None:
        """The parameters are about to change. Disallowing twice is fine.

        Raises TimeoutError when a reader holds on.
        """
        if self._readable:
            self._lock.w_acquire()
            self._readable = False

    def collect(self, manager_state: Callable[[], Any]) -> dict[str, Any]:
        """The payload for a healing group: `{"user": {key: state}, "torchft": manager_state()}`."""
        with self._lock.r_lock():
            assert self._functions, "no state is registered: a joining group could not heal"
            user = {key: functions.save() for key, functions in self._functions.items()}
            if self.copies:
                user = tree_map_only(torch.Tensor, _copy, user)
            return {"user": user, "torchft": manager_state()}

    def load(self, states: dict[str, Any]) -> None:
        """Load every registered key, in order.

        Raises HealError when the donor lacks a key, or a load function fails.
        """
        missing = sorted(self._functions.keys() - states.keys())
        if missing:
            raise HealError(f"the donor has no state {missing}: register equal keys in every group")
        for key, functions in self._functions.items():
            try:
                functions.load(states[key])
            except Exception as error:
                raise HealError(f"load_state_dict of {key!r} failed: {error}") from error


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()
