"""Notice that an optimizer is stepped by itself, where only a strategy may step it.

    guard = StepGuard(optimizer, "call replicated.step() in place of optimizer.step()")
    guard.begin()            # a step of the strategy has begun: no other one may come
    with guard.allowed():    # the strategy's own
        strategy.step()

The last guard of an optimizer replaces the one before it: a run may begin anew in its process.

A GradScaler leaves a step out after an infinity, and would be noticed late: an optimizer that is
guarded says that it looks at infinities itself, so that the scaler calls each of its steps.

Before the first `begin` one step is let through: torch's checkpoints take one, with gradients of
zero, to have the optimizer make its state. An optimizer without torch's step hooks is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

from torchft.errors import PhaseError
from torchft.step_hooks import hook_before_steps
from torchft.untraced import untraced

__all__ = ["StepGuard"]

_guards: WeakKeyDictionary[Any, StepGuard] = WeakKeyDictionary()
"""The guard of each optimizer that is seen."""


class StepGuard:
    """Raises PhaseError in a step of `optimizer` that is not the strategy's; `instead` completes
    the error with what to call."""

    def __init__(self, optimizer: Any, instead: str) -> None:
        self._says = f"a step of {type(optimizer).__name__} synchronises nothing: {instead}"
        self._optimizer = ref(optimizer)
        self._begun = self._allowed = self._stepped = self._marked = False
        self._handles = hook_before_steps(optimizer, untraced(lambda *_: self._look()))
        if self._handles:
            if (before := _guards.get(optimizer)) is not None:
                before.end()
            _guards[optimizer] = self

    def begin(self) -> None:
        """From now on every step but those in `allowed` is refused."""
        self._begun = True
        optimizer = self._optimizer() if self._handles else None
        if optimizer is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer._step_supports_amp_scaling = self._marked = True

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """In here the strategy steps the optimizer."""
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    def end(self) -> None:
        """Take the hooks off: the optimizer may be stepped by anybody again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        optimizer, marked, self._marked = self._optimizer(), self._marked, False
        if marked and optimizer is not None:
            del optimizer._step_supports_amp_scaling

    def _look(self) -> None:
        if self._allowed:
            return
        if self._begun or self._stepped:
            raise PhaseError(self._says)
        self._stepped = True
