"""Whoever has to act when a step begins and before it is voted on, e.g. what averages gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from torchft.errors import SettingsError, StepError
from torchft.manager.fingerprint import Description
from torchft.manager.weak_registry import WeakRegistry

if TYPE_CHECKING:
    from torchft.manager.step import Step

__all__ = ["StepListener", "StepListeners"]


class StepListener(Protocol):
    """What is called on the training thread in each step."""

    kind: str
    """What it is, in the words that a difference between groups is told with."""
    description: Description
    """What must be equal in all groups before it sends anything; another object when it changes."""

    sent: int
    """How many averages it has begun in this step."""

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the model that it is about has this parameter."""
        ...

    def averaged(self) -> Sequence[tuple[str, nn.Parameter]]:
        """The parameters that are equal in all groups, by name, also those that are frozen."""
        ...

    def before_step(self) -> Description:
        """A step is about to begin. Returns what must be equal in all groups this once, e.g. the
        values that each of them has made for a new parameter."""
        ...

    def before_vote(self, *, idle: bool) -> None:
        """The step is about to be voted on. `idle`: this group sent nothing in it so far."""
        ...


class StepListeners:
    """The listeners of one manager, in the order in which they were added."""

    def __init__(self) -> None:
        self._listeners = WeakRegistry[StepListener]()

    def add(self, listener: StepListener) -> None:
        """Call `listener` when a step begins and before its vote, while somebody else holds it."""
        self._listeners.add(listener)

    def names(self) -> dict[int, str] | None:
        """The names of the parameters that are equal in all groups, by identity; None where there
        is no listener."""
        named = self._listeners.named()
        return {id(p): f"{key}.{name}" for key, one in named for name, p in one.averaged()} or None

    def before_step(self) -> tuple[Description, Description]:
        """Tell all that a step is about to begin.

        Returns:
            What must be equal in all groups always, and what must be this once.
        """
        once: Description = {}
        for key, listener in self._listeners.named():
            once.update({f"new in {key}: {k}": v for k, v in listener.before_step().items()})
        return {key: listener.description for key, listener in self._listeners.named()}, once

    def before_vote(self, step: Step) -> None:
        """The step is about to be voted on. One in which this group sent nothing, although the
        others may wait for it, is completed by a lone listener; several cannot know whose turn it
        was, so that the step is discarded."""
        listeners = self._listeners.named()
        idle = not step.averages
        if idle and len(listeners) > 1 and not step.failed:
            kinds = ", ".join(key for key, _ in listeners)
            step.report(
                StepError(
                    f"no gradient was averaged in this step, of {kinds}: call backward before step"
                )
            )
        for _, listener in listeners:
            if not step.failed:
                listener.before_vote(idle=idle)

    def refuse_unaveraged(self, param_groups: Sequence[dict[str, Any]], step: Step) -> None:
        """See that an optimizer applies no gradient that this group alone has: of a parameter that
        no listener's model has, where nothing was averaged but by listeners.

        Raises:
            SettingsError: it does; names the parameter.
        """
        listeners = [listener for _, listener in self._listeners.named()]
        sent = sum(listener.sent for listener in listeners)
        if not listeners or step.failed or len(step.averages) > sent:
            return
        for number, group in enumerate(param_groups):
            names = group.get("param_names") or [str(n) for n in range(len(group["params"]))]
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is None or any(one.holds(parameter) for one in listeners):
                    continue
                raise SettingsError(
                    f"parameter {name} of the optimizer's group {number}, of shape "
                    f"{tuple(parameter.shape)}, is in no wrapped model, so that each group would "
                    "train its own: put it into the module that is wrapped, average its gradient "
                    "with manager.allreduce, or give it to an optimizer that is not wrapped"
                )
