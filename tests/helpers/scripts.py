"""What a replica group's script trains: `Tiny`, with an inner optimizer, and both as its state."""

from __future__ import annotations

from typing import Any

from helpers.reference import INNER
from helpers.tiny import Tiny, backward
from torch import Tensor

__all__ = ["SavesModelAndInner", "TinyScript"]


class SavesModelAndInner:
    """What a group gives to one that heals: the model and its inner optimizer."""

    model: Tiny
    inner: Any

    def save(self) -> Any:
        return {"model": self.model.state_dict(), "inner": self.inner.state_dict()}

    def load(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["inner"])


class TinyScript(SavesModelAndInner):
    """The model and its inner optimizer, on the data of one node."""

    def __init__(self, node: int, seed: int = 0) -> None:
        self.model = Tiny(seed)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.inner = INNER(self.trained)
        self._node = node

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trained]

    def step(self, number: int) -> None:
        backward(self.model, self._node, number)
        self.inner.step()
        self.inner.zero_grad()
