"""What is trained is what was there at the start: nothing thawed, frozen, replaced or moved since.

Nodes' weights are rows of one matrix, and all nodes average the same parameters. A parameter that a
run's own code unfreezes would train at its node alone, unseen; one that it replaces or moves
would leave the matrix behind. It is looked for after every backward pass: one comparison of a
parameter costs less than a microsecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from torchft.errors import SettingsError

__all__ = ["Trained"]

_Part = Mapping[str, nn.Parameter | nn.Module | None]

_WAY_ON = (
    "what is trained is settled when a run starts, since all nodes average the same parameters. "
    "Settle it before fit; to change it half way, end the run and begin another from trainer.result"
)


class Trained:
    """One node's model, as it was when the run began. `parameters` are those that train."""

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        trained = {id(p) for p in parameters}
        self._model = model
        self._named = dict(model.named_parameters())
        self._flags = [(name, p, id(p) in trained) for name, p in self._named.items()]
        self._places = [(n, p, p.data_ptr(), p.shape) for n, p, trains in self._flags if trains]
        self._parts = self._parts_now()

    def _parts_now(self) -> list[tuple[_Part, _Part]]:
        """What modules hold: their own dicts, and copies to compare them with."""
        return [
            (part, dict(part))
            for module in self._model.modules()
            for part in (module._parameters, module._modules)
        ]

    def check(self, node: int, step: int) -> None:
        """After the backward pass of `step`, which counts from 0.

        Raises:
            SettingsError: what changed, at which node and in which step.
        """
        found = self._replaced() or self._switched() or self._moved()
        if found is not None:
            raise SettingsError(f"{found} in step {step + 1} of node {node}: {_WAY_ON}")

    def _replaced(self) -> str | None:
        if all(_same(part, before) for part, before in self._parts):
            return None
        now, before = dict(self._model.named_parameters()), self._named
        for name in (*before, *now):
            if now.get(name) is not before.get(name):
                what = "added" if name not in before else "replaced" if name in now else "removed"
                return f"parameter {name} was {what}"
        self._parts = self._parts_now()  # modules without parameters came or went
        return None

    def _switched(self) -> str | None:
        for name, p, trains in self._flags:
            if p.requires_grad is not trains:
                what = "frozen" if trains else "unfrozen"
                return f"parameter {name} was {what} (requires_grad={p.requires_grad})"
        return None

    def _moved(self) -> str | None:
        for name, p, at, shape in self._places:
            if p.data_ptr() != at or p.shape != shape:
                return f"parameter {name} was given other memory (by p.data = … or a resize)"
        return None


def _same(part: _Part, before: _Part) -> bool:
    return len(part) == len(before) and all(part.get(k) is v for k, v in before.items())
