"""Which parameters a model trains, noted once; says later what has changed.

What travels in a round is settled when a front is made: names, shapes, dtypes, devices. A layer
that is unfrozen later, a parameter that is added to the optimizer, replaced, moved or resized would
be trained by each group for itself, and nobody would notice. So it is an error, before the next
step. A parameter that is frozen later stays in the rounds, and is equal in all groups; but an outer
optimizer would go on moving it by its momentum, so with `frozen_steps` that is an error too, once
it has been frozen for so many steps in a row. (GANs freeze one half while the other one steps.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import MismatchError
from torchft.parameter_marks import Mark, marks_of, parameters_of
from torchft.sharded import is_sharded

__all__ = ["TrainedModel"]

Key = tuple[int, str]
"""Position of the module, and the parameter's name in it."""


@dataclass(frozen=True)
class _Noted:
    """A parameter as it was."""

    parameter: Tensor
    trained: bool
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameter: Tensor) -> _Noted:
        return cls(
            parameter, parameter.requires_grad, parameter.shape, parameter.dtype, parameter.device
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{list(self.shape)} {dtype} on {self.device}"


class TrainedModel:
    """What `modules` train, and what `optimizer` steps, when this object is made; `front` is what
    errors call the object that relies on it."""

    def __init__(self, modules: Sequence[nn.Module], optimizer: Any, *, front: str) -> None:
        self._modules, self._optimizer, self._front = list(modules), optimizer, front
        self._noted = {key: _Noted.of(parameter) for key, parameter in self._parameters()}
        self._stepped = [id(parameter) for _, parameter in self._optimized()]
        self._trained = {id(noted.parameter) for noted in self._noted.values() if noted.trained}
        self._as_noted = self._marks()
        """To be compared at once; names are looked up when something differs."""
        self._frozen: dict[Key, int] = {}
        """How many steps in a row a trained parameter has been frozen."""

    def check(self, frozen_steps: int | None = None) -> None:
        """Call it before each step. `frozen_steps` None: parameters may be frozen.

        Raises:
            MismatchError: names a parameter, and how it is not as it was.
        """
        stepped = [id(parameter) for _, parameter in self._optimized()]
        if self._marks() == self._as_noted and stepped == self._stepped:
            self._frozen.clear()
            return
        change = self._changed() or self._added() or self._frozen_long(frozen_steps)
        if change is not None:
            raise MismatchError(
                f"{change}. What is trained is settled when {self._front} is made, since all "
                "groups must train the same: make this change before, in all groups alike; to "
                "train in phases, start each phase as a new run, from a checkpoint of the last"
            )

    def _marks(self) -> list[Mark]:
        return marks_of(p for module in self._modules for p in parameters_of(module))

    def _parameters(self) -> Iterator[tuple[Key, Tensor]]:
        for at, module in enumerate(self._modules):
            for name, parameter in module.named_parameters():
                yield (at, name), parameter

    def _optimized(self) -> Iterator[tuple[int, Tensor]]:
        for number, group in enumerate(self._optimizer.param_groups):
            for parameter in group["params"]:
                yield number, parameter

    def _changed(self) -> str | None:
        found = set()
        for key, parameter in self._parameters():
            found.add(key)
            change = self._how(self._noted.get(key), parameter)
            if change is not None:
                return f"parameter {key[1]} {change}"
        gone = [key for key, noted in self._noted.items() if noted.trained and key not in found]
        return f"parameter {gone[0][1]} is no longer part of the model" if gone else None

    def _how(self, noted: _Noted | None, parameter: Tensor) -> str | None:
        trains = parameter.requires_grad
        if noted is None:
            if trains and id(parameter) not in self._trained:
                return "is trained, and was not there before"
            return None
        # Of a sharded parameter, FSDP may show the gathered one in its place.
        if noted.parameter is not parameter and not is_sharded(noted.parameter):
            return "was replaced by another tensor" if trains or noted.trained else None
        if trains and not noted.trained:
            return "was frozen before, and is trained now"
        facts = parameter.shape, parameter.dtype, parameter.device
        if noted.trained and facts != (noted.shape, noted.dtype, noted.device):
            return f"was {noted} and is {_Noted.of(parameter)}"
        return None

    def _added(self) -> str | None:
        for number, parameter in self._optimized():
            known = id(parameter) in self._stepped or id(parameter) in self._trained
            if not known and parameter.requires_grad:
                return (
                    f"a parameter of shape {list(parameter.shape)} was added to group {number} of "
                    "the inner optimizer, and is not part of the model that is synchronised"
                )
        return None

    def _frozen_long(self, longest: int | None) -> str | None:
        if longest is None:
            return None
        self._frozen = {
            key: self._frozen.get(key, 0) + 1
            for key, noted in self._noted.items()
            if noted.trained and not noted.parameter.requires_grad
        }
        for (_, name), steps in self._frozen.items():
            if steps >= max(longest, 2):
                return (
                    f"parameter {name} was frozen {steps} steps ago, and the outer optimizer would "
                    "go on moving it"
                )
        return None
