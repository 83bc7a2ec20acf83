"""The part of a manager in which scripts say what a group that joins or comes back must get."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

from torchft.manager.live_state import LiveState
from torchft.manager.registered import Registered

__all__ = ["Registering"]


class Registering:
    """A base class of `Manager`. `timeout` bounds the wait for whoever reads the state."""

    def __init__(self, timeout: timedelta) -> None:
        self.state = LiveState(timeout)
        """What a healing group needs, and when it may be read."""
        self.registered = Registered()
        """What was given to `register`, and the digests of it."""

    def register(self, *, own: Collection[str] = (), **objects: Any) -> None:
        """Have objects heal by their own `state_dict`: model, optimizer, scheduler, data, ….

        Args:
            own: names of those that are this group's alone, and so do not heal from another one.
            objects: by name: each a torch.Generator, or has `state_dict` and `load_state_dict`.

        Raises:
            SettingsError: no such object; a name in use; an optimizer of another model.
        """
        added = self.registered.add(objects, own, self.state.registered)
        for name, (load, save) in added.items():
            self.register_state_dict_fn(name, load, save)

    def register_state_dict_fn(
        self,
        key: str,
        load_state_dict: Callable[[Any], None],
        state_dict: Callable[[], Any],
    ) -> None:
        """Add state that a healing group needs. It is loaded in the order of registration."""
        self.state.register(key, load_state_dict, state_dict)

    def set_state_dict_fns(
        self, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None:
        """Register state under the name `default`. Deprecated: use `register_state_dict_fn`."""
        self.register_state_dict_fn("set_state_dict_fns", load_state_dict, state_dict)

    def allow_state_dict_read(self) -> None:
        """Let donors read the parameters again: they are complete."""
        self.state.allow_read()

    def disallow_state_dict_read(self) -> None:
        """Keep donors from reading the parameters, which are about to change.

        Raises:
            TimeoutError: readers hold on beyond `timeout`.
        """
        self.state.disallow_read()
