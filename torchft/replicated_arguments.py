"""What `Replicated` may be made of: a model, an optimizer, a strategy and a manager that fit.

Everything else is a SettingsError that says what to give instead, before any group is met.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from torchft.arguments import in_words
from torchft.ddp import DistributedDataParallel, PureDistributedDataParallel
from torchft.errors import SettingsError
from torchft.optim import OptimizerWrapper
from torchft.step_hooks import check_optimizer, parameters_of
from torchft.strategies.checks import check_among_groups
from torchft.strategies.model_local import ModelLocal
from torchft.strategies.recipe import Recipe
from torchft.strategies.strategy import Strategy

__all__ = ["check_inner", "check_manager", "modules_of", "strategy_of", "warn_of_strangers"]


def strategy_of(strategy: Any, optimizer: object) -> Strategy:
    """The strategy that was given.

    Raises:
        SettingsError: it is none, is in use, or cannot run among groups.
    """
    if isinstance(optimizer, Strategy | Recipe):
        raise SettingsError(
            f"{in_words(optimizer)} stands in the optimizer's place: write Replicated(manager, "
            "model, optimizer, strategy), or None for the optimizer that the strategy names"
        )
    if isinstance(strategy, Recipe):
        name = type(strategy).__name__
        raise SettingsError(f"{name} is a recipe, not a strategy: write Strategy([{name}(…)])")
    if isinstance(strategy, type):
        name = strategy.__name__
        raise SettingsError(f"the strategy is the class {name}: give an object, {name}(…)")
    if not isinstance(strategy, Strategy):
        raise SettingsError(
            f"the strategy is {in_words(strategy)}: give one of torchft.strategies, such as "
            "Strategy([AllReduceRecipe()])"
        )
    strategy.check_unused()
    check_among_groups(strategy.recipes)
    return strategy


def check_manager(manager: Any) -> None:
    """The manager can serve a Replicated.

    Raises:
        SettingsError: it is none, or serves one already.
    """
    try:
        registered = manager.state.registered
    except AttributeError:
        raise SettingsError(
            f"the manager is {in_words(manager)}: give a torchft.Manager(…), as in "
            "Replicated(manager, model, optimizer, strategy)"
        ) from None
    if "Replicated" in registered:
        raise SettingsError(
            "this manager serves a Replicated already: give that one all models, as a list, or "
            "make a manager for each"
        )


def modules_of(model: Any) -> list[nn.Module]:
    """The modules that were given, one or several.

    Raises:
        SettingsError: something is no module, or is wrapped already; nothing can be trained.
    """
    several = isinstance(model, Iterable) and not isinstance(model, nn.Module | str)
    modules = list(model) if several else [model]
    for module in modules:
        if not isinstance(module, nn.Module):
            raise SettingsError(
                f"the model is {in_words(module)}: give a torch.nn.Module, or several in a list"
            )
        if isinstance(module, DistributedDataParallel | PureDistributedDataParallel):
            raise SettingsError(
                f"the model is wrapped in torchft's {type(module).__name__}, which averages among "
                "the groups by itself: give the model that it wraps"
            )
    if not any(p.requires_grad for module in modules for p in module.parameters()):
        raise SettingsError(
            "the model has no parameter that requires a gradient: unfreeze what is to be trained, "
            "with requires_grad_(True), before this is made"
        )
    return modules


def check_inner(optimizer: object) -> None:
    """`optimizer` can take the inner steps of a strategy.

    Raises:
        SettingsError: it is no optimizer, or one that votes on each of its steps.
    """
    check_optimizer("the inner optimizer", optimizer)
    if isinstance(optimizer, OptimizerWrapper):
        raise SettingsError(
            "the inner optimizer is a torchft Optimizer, which votes on every step: give the one "
            "that it wraps, since here only rounds are voted on"
        )


def warn_of_strangers(local: ModelLocal, optimizer: Any) -> None:
    """Parameters that train here and are in no fragment drift apart between the groups."""
    known = {id(p) for p in local.parameters}
    strangers: list[Tensor] = [
        p for p in parameters_of(optimizer) if p.requires_grad and id(p) not in known
    ]
    if strangers:
        warnings.warn(
            f"{len(strangers)} parameters of the inner optimizer are in no fragment, the first of "
            f"shape {tuple(strangers[0].shape)}: they are never synchronised",
            stacklevel=4,
        )
