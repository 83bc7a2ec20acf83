"""What a model looks like to the server: names, shapes, dtypes, and how it is cut in fragments.

A fragment has whole blocks (`torchft.strategies.fragments`); on the wire and at the server its
numbers are one flat row of fp32, in the parameters' order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from torchft.errors import MismatchError
from torchft.strategies.fragments import cut
from torchft.strategies.local import Fragment

__all__ = ["ModelShape", "Parameter"]

_SHOWN = 5
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class Parameter:
    """One trained tensor; `dtype` is the worker's, such as `bfloat16`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The worker's dtype as an object of torch.

        Raises:
            ValueError: there is no floating-point dtype of that name.
        """
        found = vars(torch).get(self.dtype)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"{self.name} is {self.dtype[:40]}, which cannot be averaged")
        return found


@dataclass(frozen=True)
class ModelShape:
    """All trained parameters, in the order of the model."""

    parameters: tuple[Parameter, ...]
    fragments: tuple[Fragment, ...]

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> ModelShape:
        """The shape of a model, of its trained parameters by name, in one fragment."""
        found = tuple(
            Parameter(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in named
        )
        return cls(found, (Fragment(0, tuple(range(len(found)))),))

    @property
    def fingerprint(self) -> str:
        """Equal where models can be averaged. Fragments are the server's to choose."""
        text = json.dumps([[p.name, p.shape, p.dtype] for p in self.parameters])
        return hashlib.sha256(text.encode()).hexdigest()

    def size(self, fragment: int) -> int:
        """How many numbers a fragment has."""
        return sum(parameter.numel for parameter in self.of_fragment(fragment))

    @property
    def numel(self) -> int:
        """How many numbers the model has."""
        return sum(parameter.numel for parameter in self.parameters)

    def of_fragment(self, fragment: int) -> tuple[Parameter, ...]:
        """The parameters of a fragment, in its row's order."""
        return tuple(self.parameters[at] for at in self.fragments[fragment].parameters)

    def new_row(self, fragment: int) -> Tensor:
        """New memory for a fragment's numbers, fp32 `[1, n]` on the CPU."""
        return torch.empty(1, self.size(fragment), dtype=torch.float32, device="cpu")

    def views(self, fragment: int, flat: Tensor) -> dict[str, Tensor]:
        """Parameter name → its part of `flat` `[1, n]`, in its shape."""
        parameters = self.of_fragment(fragment)
        ends = list(accumulate(p.numel for p in parameters))
        return {
            p.name: flat[0, end - p.numel : end].view(p.shape)
            for p, end in zip(parameters, ends, strict=True)
        }

    def check_same(self, other: ModelShape) -> None:
        """Refuse a worker's model that is not this one.

        Raises:
            MismatchError: names what differs.
        """
        mine = {p.name: p for p in self.parameters}
        theirs = {p.name: p for p in other.parameters}
        wrong = [f"it lacks {name}" for name in mine if name not in theirs]
        wrong += [f"it has {name}, which is unknown here" for name in theirs if name not in mine]
        wrong += [
            f"{name} is {_said(theirs[name])} there and {_said(mine[name])} here"
            for name in mine
            if name in theirs and theirs[name] != mine[name]
        ]
        if not wrong and self.parameters != other.parameters:
            wrong = ["its parameters come in another order"]
        if wrong:
            more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise MismatchError(
                f"the worker's model is not the server's: {'; '.join(wrong[:_SHOWN])}{more}"
            )

    def to_json(self) -> dict[str, Any]:
        """The shape as JSON values; `from_json` is the inverse."""
        return {
            "parameters": [[p.name, list(p.shape), p.dtype] for p in self.parameters],
            "fragments": [list(fragment.parameters) for fragment in self.fragments],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelShape:
        """The shape that JSON values describe which came over a network.

        Raises:
            MismatchError: it describes no model.
        """
        try:
            parameters = tuple(_parameter(one) for one in data["parameters"])
            held = [tuple(map(_position, positions)) for positions in data["fragments"]]
        except (KeyError, TypeError, ValueError, LookupError) as error:
            raise MismatchError(f"this describes no model: {str(error)[:200]}") from None
        if len({p.name for p in parameters}) != len(parameters) or not parameters:
            raise MismatchError("a model has parameters, each with a name of its own")
        if sorted(at for mine in held for at in mine) != list(range(len(parameters))):
            raise MismatchError("the fragments do not have each parameter once")
        return cls(parameters, tuple(Fragment(index, mine) for index, mine in enumerate(held)))

    def cut(self, parts: int) -> ModelShape:
        """The same model in so many fragments.

        Raises:
            SettingsError: there are fewer parameters than parts.
        """
        names = [parameter.name for parameter in self.parameters]
        sizes = [parameter.numel * 4 for parameter in self.parameters]  # at the server all are fp32
        return ModelShape(self.parameters, tuple(cut(names, sizes, parts)))


def _position(at: object) -> int:
    if type(at) is not int:
        raise ValueError(f"a fragment holds {str(at)[:40]}, which is no position")
    return at


def _parameter(described: object) -> Parameter:
    match described:
        case [str(name), list(shape), str(dtype)] if len(shape) <= _MAX_DIMENSIONS:
            if not name.isprintable():
                raise ValueError(f"the name {name[:40]!a} has characters that do not print")
            found = Parameter(name, tuple(shape), dtype)
            if found.torch_dtype and all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
                return found
    raise ValueError(f"a parameter is described as {str(described)[:80]}")


def _said(parameter: Parameter) -> str:
    return f"{list(parameter.shape)} {parameter.dtype}"
