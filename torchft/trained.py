"""Which parameters of a model are trained, and what has changed about that.

A model is not what it was when layers are frozen or unfrozen, replaced, added, moved, resized or
converted. Whoever averages gradients looks once a step, before anything is computed in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import nn

from torchft.errors import SettingsError
from torchft.manager.fingerprint import Description, describe
from torchft.parameter_marks import marks_of, parameters_of
from torchft.sharded import is_sharded, local_part, reshard

__all__ = [
    "Change",
    "Named",
    "TrainedParameters",
    "describe_values",
    "refuse_sparse",
    "sparse_error",
]

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class Change:
    """What became of the trained parameters since the last look."""

    added: tuple[str, ...]
    """Those that are trained now, and were not."""
    removed: tuple[str, ...]
    """Those that were trained, and are not: frozen, replaced or taken out."""
    created: tuple[Named, ...]
    """Those of the added that the model did not have before, so that their values are new, too."""


class TrainedParameters:
    """The trained parameters of a model, as they were at the last look.

    `ignored` are names of parameters that are trained but never averaged.
    """

    def __init__(self, module: nn.Module, ignored: Set[str] = frozenset()) -> None:
        self._module = module
        self._ignored = ignored
        reshard(module)
        self._looked_at = self._known = parameters_of(module)
        self.sharded = any(map(is_sharded, self._known))
        """Whether some are DTensors, of which this rank holds a part."""
        # The parameters are held, so that no other one gets the identity of one that is gone.
        self._held = {id(p) for p in self._looked_at}
        self._marks = marks_of(self._looked_at)
        self.named = self._trained()
        """Their names and they themselves, in the order of the model."""
        self._trained_marks = marks_of(p for _, p in self.named)

    def look(self) -> Change | None:
        """What has changed since the last look, e.g. a parameter's shape or that it is frozen.

        None while nothing has, and also while all are frozen: a discriminator is, while the
        generator learns, and it is the same afterwards.
        """
        found = self._parameters()
        marks = marks_of(found)
        if marks == self._marks:
            return None
        self._looked_at, self._marks = found, marks
        self._held = {id(p) for p in found}
        before, now = self.named, self._trained()
        trained_marks = marks_of(p for _, p in now)
        if not now or trained_marks == self._trained_marks:
            return None
        change = _difference(before, now, {id(p) for p in self._known})
        self._known, self.named, self._trained_marks = found, now, trained_marks
        return change

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the model has this parameter, trained or not."""
        if id(parameter) in self._held:
            return True
        return any(parameter is one for one in parameters_of(self._module))

    def averaged(self) -> list[Named]:
        """All parameters but those that are never averaged, frozen ones too."""
        named = self._module.named_parameters()
        return [(name, p) for name, p in named if name not in self._ignored]

    def unseen(self) -> str | None:
        """The name of a parameter that is trained now and was not at the last look."""
        held = {id(p) for _, p in self.named}
        if all(id(p) in held for p in self._parameters() if p.requires_grad):
            return None
        return next((name for name, p in self._trained() if id(p) not in held), None)

    def description(self) -> Description:
        """Name, shape and dtype of every parameter of the model; of one that is frozen, that."""
        trained = {id(p) for _, p in self.named}
        named = list(self._module.named_parameters())
        frozen = {name for name, p in named if id(p) not in trained}
        return {
            name: f"{said}, frozen" if name in frozen else said
            for name, said in describe(named).items()
        }

    def _parameters(self) -> list[nn.Parameter]:
        found = parameters_of(self._module)
        if self.sharded and not all(id(p) in self._held for p in found):
            reshard(self._module)
            found = parameters_of(self._module)
        return found

    def _trained(self) -> list[Named]:
        return [(name, p) for name, p in self.averaged() if p.requires_grad]


def _difference(before: Sequence[Named], now: Sequence[Named], known: Set[int]) -> Change:
    had, has = {id(p) for _, p in before}, {id(p) for _, p in now}
    return Change(
        added=tuple(name for name, p in now if id(p) not in had),
        removed=tuple(name for name, p in before if id(p) not in has),
        created=tuple((name, p) for name, p in now if id(p) not in known),
    )


def describe_values(named: Iterable[Named]) -> Description:
    """A digest of each parameter's values, to be compared where groups made them by themselves."""
    return {name: _digest(parameter) for name, parameter in named}


def _digest(parameter: nn.Parameter) -> str:
    row = local_part(parameter).cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"made with values {hashlib.sha256(row.numpy().tobytes()).hexdigest()[:8]}"


def refuse_sparse(module: nn.Module) -> None:
    """Raises SettingsError if a module's gradients would be sparse: what is averaged is dense."""
    for name, child in module.named_modules():
        embeds = isinstance(child, nn.Embedding | nn.EmbeddingBag)
        if embeds and child.sparse and child.weight.requires_grad:
            raise sparse_error(f"{name}.weight" if name else "weight")


def sparse_error(name: str) -> SettingsError:
    """That the gradient of the parameter `name` is sparse, and what to do."""
    return SettingsError(
        f"the gradient of {name} is sparse, and gradients are averaged densely: make its embedding "
        "with sparse=False, freeze it, or train with LocalSGD or DiLoCo, which average weights"
    )
