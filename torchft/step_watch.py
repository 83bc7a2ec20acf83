"""Notice that weights are trained while no step of the optimizer is seen.

An optimizer may be stepped in a way that no hook sees: a fused step in the backward pass, a copy
of the optimizer that somebody made, a new one in place of the old. Then nobody would ever
synchronise, and nothing would say so. What can be seen is this: between two backward passes the
weights have changed, and no step was seen.

Once that is harmless (sharpness-aware optimizers disturb the weights between two passes of one
step), twice in a row for two parameters it is not. A few parameters are looked at, after each of
their backward passes. Until the first step is seen their sums are compared as well, since
`p.data.add_(…)` leaves no other trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from torchft.errors import PhaseError
from torchft.sharded import local_part
from torchft.untraced import untraced

__all__ = ["StepWatch"]

_WATCHED = 4
_ENOUGH = 2
"""So many changes in a row, and so many parameters that changed."""


@dataclass
class _Seen:
    """One parameter, since the last step that was seen."""

    last: tuple[int, int, float] | None = None
    """Version, address and sum after its last backward pass; None: it had none."""
    changes: int = 0
    """How often it changed between two of them."""

    def look(self, now: tuple[int, int, float]) -> None:
        self.changes += self.last is not None and self.last != now
        self.last = now


class StepWatch:
    """Looks at some of `parameters` after each backward pass of theirs.

    Whoever sees the steps says so with `stepping` and `stepped`. `says` describes the optimizer in
    the error.
    """

    def __init__(self, parameters: Iterable[Tensor], says: str) -> None:
        self._parameters = _some([p for p in parameters if p.requires_grad and p.is_leaf])
        self._seen = [_Seen() for _ in self._parameters]
        self._says = says
        self._handles: list[RemovableHandle] = []
        self._stepping = self._stepped = False
        self.saw_backward = False
        """Since it began to look."""

    def begin(self) -> None:
        """Watch the parameters' gradients, until `end` is called."""
        self.saw_backward = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._looking_at(at))
            for at, parameter in enumerate(self._parameters)
        ]

    def end(self) -> None:
        """Stop watching and take all hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def stepping(self) -> None:
        """A step begins; a closure may have backward passes in it."""
        self._stepping = True

    def stepped(self) -> None:
        """Note that a step of the optimizer has ended."""
        self._stepping, self._stepped = False, True
        self.forget()

    def not_stepped(self) -> None:
        """What had begun came to nothing."""
        self._stepping = False

    def forget(self) -> None:
        """Weights were written by somebody else than the optimizer."""
        self._seen = [_Seen() for _ in self._parameters]

    def check_any(self) -> None:
        """At the end of a loop, which may have been too short for two changes.

        Raises:
            PhaseError: weights changed after a backward pass, and no step was ever seen.
        """
        if self._stepped:
            return
        for seen, parameter in zip(self._seen, self._parameters, strict=True):
            if seen.last is not None:
                seen.look(self._print(parameter))
        if any(seen.changes for seen in self._seen):
            raise self._missed()

    def _looking_at(self, at: int) -> Callable[[Tensor], None]:
        return untraced(lambda _: self._look(at))

    def _look(self, at: int) -> None:
        self.saw_backward = True
        if self._stepping:
            return
        self._seen[at].look(self._print(self._parameters[at]))
        often = sum(seen.changes >= _ENOUGH for seen in self._seen)
        if often >= min(_ENOUGH, len(self._seen)):
            raise self._missed()

    def _print(self, parameter: Tensor) -> tuple[int, int, float]:
        held = local_part(parameter)
        total = 0.0 if self._stepped else float(held.sum(dtype=torch.float64))
        return parameter._version, held.data_ptr(), total

    def _missed(self) -> PhaseError:
        return PhaseError(
            f"weights change between backward passes, and no step of {self._says} is seen, so "
            "nothing would ever be synchronised: give the optimizer whose step() is called, and no "
            "other object in its place later"
        )


def _some(parameters: list[Tensor]) -> list[Tensor]:
    """At most so many, spread from the first to the last."""
    last = len(parameters) - 1
    return [parameters[at] for at in sorted({last * n // (_WATCHED - 1) for n in range(_WATCHED)})]
