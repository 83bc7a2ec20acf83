"""Objects that heal by their own `state_dict`: what `Manager.register` takes.

    manager.register(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler,
                     dataloader=loader, rng=torch.default_generator)

All of it travels to a group that joins or comes back. What is named in `own` does not: it is this
group's alone, and only `digest_own` covers it.

    shared   equal in all groups by contract; travels        digest_shared
    own      of this group alone; stays                      digest_own
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from torchft.arguments import in_words
from torchft.digest import digest
from torchft.errors import SettingsError
from torchft.manager.optimizer_state import optimizer_state
from torchft.step_hooks import check_optimizer, check_trains

__all__ = ["Registered"]


@runtime_checkable
class _Stateful(Protocol):
    """A module, an optimizer, a schedule, a loader that knows its position, …."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True)
class _Entry:
    stateful: Any
    load: Callable[[Any], Any]
    save: Callable[[], Any]


class Registered:
    """What one rank registered by name, shared and its own."""

    kind = "registered"

    def __init__(self) -> None:
        self._shared: dict[str, _Entry] = {}
        self._own: dict[str, _Entry] = {}

    def add(
        self, objects: Mapping[str, Any], own: Collection[str], taken: Collection[str]
    ) -> dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]]:
        """Take all of `objects`, or none of them.

        Args:
            objects: by name.
            own: names of those that stay in this group.
            taken: names of other state that travels.

        Returns:
            Name → load and save, of those that travel.

        Raises:
            SettingsError: see `Manager.register`.
        """
        _check_names(objects, own, {*taken, *self._shared, *self._own})
        entries = {name: _entry(name, one) for name, one in objects.items()}
        _check_pairs({**self._shared, **self._own, **entries})
        for name, entry in entries.items():
            (self._own if name in own else self._shared)[name] = entry
        return {name: (e.load, e.save) for name, e in entries.items() if name not in own}

    def digest_shared(self) -> str:
        """A digest of what is equal in all groups after equal steps. Of sharded tensors, this
        rank's part counts."""
        return _digest(self._shared)

    def equal_state(self) -> dict[str, Any]:
        """Of what is shared, what no group may start with other values of: parameters, and state
        and options of optimizers. Buffers, random numbers and positions may differ."""
        shared = {name: entry.stateful for name, entry in self._shared.items()}
        parameters = {
            f"{key}.{name}": parameter
            for key, one in shared.items()
            if isinstance(one, nn.Module)
            for name, parameter in one.named_parameters()
        }
        names = {id(parameter): name for name, parameter in parameters.items()} or None
        optimizers = {
            f"{key}: {name}": value
            for key, one in shared.items()
            if isinstance(one, Optimizer)
            for name, value in optimizer_state(one, names)
        }
        return parameters | optimizers

    def digest_own(self) -> str:
        """A digest of what is this group's alone."""
        return _digest(self._own)


def _check_names(objects: Mapping[str, Any], own: Collection[str], taken: Collection[str]) -> None:
    if not objects:
        raise SettingsError("nothing to register: write register(model=model, optimizer=optimizer)")
    if isinstance(own, str):
        raise SettingsError(f"own={own!r} is one string: give a list of names, own=[{own!r}]")
    if unknown := sorted(set(own) - objects.keys()):
        raise SettingsError(
            f"own names {unknown}, which this call does not register: it has {sorted(objects)}"
        )
    if twice := sorted(objects.keys() & set(taken)):
        raise SettingsError(f"{twice} registered already: give each object a name of its own")


def _entry(name: str, one: Any) -> _Entry:
    if isinstance(one, torch.Generator):
        return _Entry(one, one.set_state, one.get_state)
    if isinstance(one, type) or not isinstance(one, _Stateful):
        raise SettingsError(
            f"{name} is {in_words(one)}, which has no state_dict() and load_state_dict(): give an "
            "object that has both, or a torch.Generator"
        )
    return _Entry(one, one.load_state_dict, one.state_dict)


def _check_pairs(entries: Mapping[str, _Entry]) -> None:
    """The optimizer called `optimizer` steps the module called `model`, where there are both."""
    model, optimizer = entries.get("model"), entries.get("optimizer")
    if optimizer is not None:
        check_optimizer("optimizer", optimizer.stateful)
    if optimizer is None or model is None or not isinstance(model.stateful, nn.Module):
        return
    trained = [(name, p) for name, p in model.stateful.named_parameters() if p.requires_grad]
    if trained:
        names, parameters = zip(*trained, strict=True)
        check_trains(names, parameters, optimizer.stateful)


def _digest(entries: Mapping[str, _Entry]) -> str:
    return digest({name: entry.save() for name, entry in entries.items()})
