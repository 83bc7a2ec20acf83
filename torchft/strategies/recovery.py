"""How a node goes on whose own numbers are not finite, after a round that came to nothing for it.

Its weights go back with the recipe's `discard`. What would bring the NaN back goes too:

    inner optimizer    the state of each parameter in which something is not finite begins anew:
                       moments and counters are zero, as before the first step
    recipe's own       a node's row of residuals or momentum that is not finite is zero
    buffers            those that are NaN get the values of the last round that committed, if the
                       recipe's rounds are about buffers; else one warning names them

Nodes whose weights are finite keep all they have, and no copies are kept for it. A node that has
nothing to go back to is not left to spoil every round of the others: it raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch

from torchft.errors import NotFiniteError, SettingsError
from torchft.finite import are_finite
from torchft.peers import Place
from torchft.strategies.buffers import LEFT, BufferBackup, nan_buffers
from torchft.strategies.local import Fragment, Local
from torchft.strategies.parts.broken import broken_rows, reset_inner
from torchft.strategies.recipe import Recipe

__all__ = ["Recovery"]


class Recovery:
    """For the recipes of one strategy."""

    def __init__(self, local: Local, recipes: Collection[Recipe]) -> None:
        self._local = local
        rides = any(recipe.buffers != LEFT for recipe in recipes)
        self.buffers = BufferBackup(local, kept=rides)
        self._said: set[str] = set()

    def broken(self, recipe: Recipe, fragment: Fragment) -> list[int]:
        """Before the recipe goes back: whose numbers were not finite. Gradients are none's."""
        return broken_rows(self._local, fragment) if recipe.place is Place.AFTER else []

    def mend(self, recipe: Recipe, fragment: Fragment, rows: list[int]) -> None:
        """After it went back, for `rows`.

        Raises:
            NotFiniteError: the weights of one of them are still not finite.
        """
        self._reset_own(recipe)
        self.buffers.restore()
        if not rows:
            return
        try:
            reset_inner(self._local, rows)
        except SettingsError as error:
            self._say_once(f"weights were not finite and went back; if they are so again, {error}")
        self._look_at_buffers(rows)
        if stuck := broken_rows(self._local, fragment):
            raise NotFiniteError(
                f"the weights of {self._called(stuck)} are NaN or infinite, and "
                f"{type(recipe).__name__} keeps none to go back to, or they are not finite either: "
                "start it again, so that it heals from the others, with a backup if the strategy "
                "can have one; where all say so, from a checkpoint with lower learning rates"
            )

    def _called(self, rows: list[int]) -> str:
        if self._local.rows == 1:
            return "this group"
        return f"node {', '.join(map(str, rows))}"

    @torch.no_grad()
    def _reset_own(self, recipe: Recipe) -> None:
        for tensors in recipe.own.values():
            for tensor in tensors:
                for row in self._local.written:
                    if not are_finite([tensor[row]]):
                        tensor[row].zero_()

    def _look_at_buffers(self, rows: list[int]) -> None:
        named = self._local.buffers()
        for name in {name for row in rows for name in nan_buffers(named[row])}:
            self._say_once(
                f"buffer {name} is NaN at {self._called(rows)}, and stays so: make it anew, as "
                "with reset_running_stats(), or have buffers='averaged', which brings it back"
            )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=2)
