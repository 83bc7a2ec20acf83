"""The settings of a strategy's recipes: whether they fit together, and are those of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torchft.errors import SettingsError
from torchft.strategies.buffers import LEFT
from torchft.strategies.recipe import By, Recipe

if TYPE_CHECKING:
    from torchft.peers import Peers

__all__ = ["check_codecs", "compare_settings"]


def compare_settings(recipes: Sequence[Recipe], peers: Peers) -> None:
    """Let groups that would mix up their numbers be refused. What no recipe has set is left out."""
    codecs = ["none" if r.codec is None else r.codec.name for r in recipes]
    if any(recipe.codec is not None for recipe in recipes):
        peers.compare("codec", ", ".join(codecs))
    if any(recipe.buffers != LEFT for recipe in recipes):
        peers.compare("buffers", ", ".join(recipe.buffers for recipe in recipes))
    compared = [recipe.compared() for recipe in recipes]
    for name in dict.fromkeys(name for settings in compared for name in settings):
        peers.compare(name, ", ".join(settings.get(name, "none") for settings in compared))


def check_codecs(recipes: Sequence[Recipe]) -> None:
    """Each codec has an average to encode, and each error feedback a codec.

    Raises:
        SettingsError: which recipe has not.
    """
    for recipe in recipes:
        if recipe.codec is not None and recipe.by is not By.AVERAGE:
            raise SettingsError(
                f"{type(recipe).__name__} does not average among all, so the codec "
                f"{recipe.codec.name} has nothing to encode: leave it out"
            )
        if recipe.error_feedback and recipe.codec is None:
            raise SettingsError(
                f"{type(recipe).__name__} with error_feedback=True has no codec, so nothing is "
                'lost that could be fed back: give it a codec, such as "int8", or leave it out'
            )
