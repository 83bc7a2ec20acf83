"""The state that a joining group needs, registered by key, and when it may be read.

Optimizers hold the write side of a lock while they change parameters, donors the read side while
they collect what to offer: no group is ever given half an optimizer step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.utils._pytree import tree_map

from torchft.checkpointing._rwlock import RWLock
from torchft.checkpointing.own_mesh import holds_dtensor, on_own_mesh
from torchft.errors import StateDictError
from torchft.manager.training_thread import TrainingThread

__all__ = ["LiveState"]

_log = logging.getLogger("torchft.manager.live_state")


@dataclass(frozen=True)
class _Functions:
    load: Callable[[Any], None]
    save: Callable[[], Any]


class LiveState:
    """What users registered, in order. `timeout` bounds the wait for the lock."""

    def __init__(self, timeout: timedelta) -> None:
        self.training = TrainingThread()
        """Who may read it."""
        self._copies = False
        self._functions: dict[str, _Functions] = {}
        self._on_disk: dict[str, _Functions] = {}
        """Of the keys that a checkpoint on disk has in another form than who heals."""
        self._lock = RWLock(timeout=timeout.total_seconds())
        self._readable = True
        self._verified: set[tuple[str, bool]] = set()
        """The keys that `verify` has looked at before a step was taken, and those after it."""

    def register(self, key: str, load: Callable[[Any], None], save: Callable[[], Any]) -> None:
        """AssertionError when `key` is registered already."""
        assert key not in self._functions, f"state {key!r} is registered already"
        self._functions[key] = _Functions(load, save)

    def register_on_disk(
        self, key: str, load: Callable[[Any], None], save: Callable[[], Any]
    ) -> None:
        """Have a checkpoint on disk hold another form of what was registered as `key`: it is
        written without waiting for rounds that are open, and loaded before the first one."""
        self._on_disk[key] = _Functions(load, save)

    @property
    def registered(self) -> list[str]:
        """The keys of what was registered so far, in order."""
        return list(self._functions)

    def offer_copies(self) -> None:
        """Copy the state before it is offered, from now on: training goes on while a step is open,
        so that the state changes while it is being fetched."""
        self._copies = True

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
            self.training.serve()
            self._lock.w_acquire()
            self._readable = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read the parameters in here, while nobody changes them.

        Raises TimeoutError when a writer holds on.
        """
        with self._lock.r_lock():
            yield

    def collect(self, manager_state: Callable[[], Any]) -> dict[str, Any]:
        """The payload for a healing group: `{"user": {key: state}, "torchft": manager_state()}`."""
        with self.reading():
            assert self._functions, "no state is registered: a joining group could not heal"
            user = {key: functions.save() for key, functions in self._functions.items()}
            if self._copies:
                user = _copied(user)
            if torch.cuda.is_initialized():  # who sends it has a stream of its own
                torch.cuda.current_stream().synchronize()
            return {"user": user, "torchft": manager_state()}

    def collect_for_disk(self) -> dict[str, Any]:
        """What a checkpoint on disk holds, by key; shares storage."""
        with self._lock.r_lock():
            return {key: functions.save() for key, functions in self._for_disk().items()}

    def verify(self, check: Callable[[Any], None], *, has_committed: bool) -> None:
        """See that the state can travel, before a group that joins needs it.

        Looks twice: at the first call, and at the first one after a committed step, when optimizers
        have made their state. All ranks of a group do so at the same calls: reading the state of a
        sharded model may take them all. `check` raises TypeError for a value that cannot travel. No
        tensor is copied. A `state_dict` that raises is a warning: some are valid only later.

        Raises:
            StateDictError: a value cannot travel; the message names the key and its place.
        """
        if not self._readable:
            return
        for key, functions in self._functions.items():
            if (key, has_committed) in self._verified:
                continue
            self._verified.add((key, has_committed))
            try:
                state = functions.save()
            except Exception as error:
                _log.warning(
                    "%s in state_dict of %r: until it works, no group can join from this one",
                    _cause(error),
                    key,
                )
                continue
            try:
                check(state)
            except (TypeError, ValueError) as error:
                raise StateDictError(f"{error} (registered as {key!r})") from error

    def unreadable(self) -> Exception | None:
        """Read all of the state. What a `state_dict` raises; None if none does."""
        try:
            for functions in self._functions.values():
                functions.save()
        except Exception as error:
            return error
        return None

    def load_from_disk(self, states: dict[str, Any], source: str) -> None:
        """As `load`, of what `collect_for_disk` returned once.

        Raises:
            StateDictError: also when it has a key that is not registered here.
            MismatchError: a tensor is sharded in another way here. Nothing has been loaded.
        """
        unknown = sorted(states.keys() - self._functions.keys())
        if unknown:
            raise StateDictError(f"{source} has state {unknown}, which is not registered here")
        self._load(self._for_disk(), states, source)

    def load(self, states: dict[str, Any], source: str) -> None:
        """Load every registered key, in order. `source` names the step and the donor, for errors.

        Raises:
            StateDictError: the donor lacks a key, or a load function fails.
            MismatchError: a tensor is sharded in another way here. Nothing has been loaded.
        """
        self._load(self._functions, states, source)

    def _for_disk(self) -> dict[str, _Functions]:
        return {**self._functions, **self._on_disk}

    def _load(
        self, registered: Mapping[str, _Functions], states: dict[str, Any], source: str
    ) -> None:
        missing = sorted(registered.keys() - states.keys())
        if missing:
            raise StateDictError(
                f"{source} has no state {missing}: register equal keys in every group"
            )
        placed = {key: states[key] for key in registered}
        if holds_dtensor(placed):  # a mesh may be known from another key only, as of moments
            placed = on_own_mesh(placed, {key: _own(key, f) for key, f in registered.items()})
        for key, functions in registered.items():
            try:
                functions.load(placed[key])
            except Exception as error:
                raise StateDictError(
                    f"{_cause(error)} in load_state_dict of {key!r}, given {source}: do all groups "
                    "run the same script?"
                ) from error


def _own(key: str, functions: _Functions) -> Any:
    """The state here, which says how tensors are sharded."""
    try:
        return functions.save()
    except Exception as error:
        raise StateDictError(
            f"{_cause(error)} in state_dict of {key!r}, which says how tensors are sharded here"
        ) from error


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _copied(state: Any) -> Any:
    """`state` with tensors of its own. A module's state dict keeps what it has as an attribute: the
    versions of its modules' state, by which they load that of older ones."""
    return tree_map(_copy, state, is_leaf=lambda value: hasattr(value, "_metadata"))


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if hasattr(value, "_metadata"):
        copied = copy(value)
        copied.update((key, _copied(one)) for key, one in value.items())
        return copied
    return value
