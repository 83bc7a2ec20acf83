"""From names and numbers of a configuration to objects: strategies, models, data.

A name with a colon, "package.module:factory", is looked up and called.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from torchft.arguments import check_integer
from torchft.errors import SettingsError
from torchft.experiments import datasets, models
from torchft.experiments.config import STRATEGIES, SimulateConfig, StrategyConfig
from torchft.renamed import old_names_of, with_new_names
from torchft.strategies import OptimSpec, Strategy

__all__ = ["data_name", "data_of", "has_interval", "model_of", "strategy_of"]

SIGNS = ("demo",)
"""These step with signs, so their inner optimizer is plain SGD unless they are given another."""
DATA_OF = {"mlp": "digits", "cnn": "digits", "gpt": "stdlib-text"}


def has_interval(strategy: StrategyConfig) -> bool:
    """Whether it synchronises every H steps."""
    return "H" in inspect.signature(_factory(strategy)).parameters


def strategy_of(
    config: SimulateConfig, strategy: StrategyConfig, *, sync_every: int | None, lr: float
) -> Strategy:
    """A new strategy object.

    Raises:
        SettingsError: options that it does not take.
    """
    factory = _factory(strategy)
    options = {"outer": "outer_optimizer"}
    given = with_new_names(
        f"torchft simulate: {strategy.shown}", strategy.options, options, settings=True
    )
    settings: dict[str, Any] = {
        "optim_spec": _inner(config, strategy, given.pop("optim", None), lr),
        "max_norm": config.max_norm,
    }
    if (outer := given.pop("outer_optimizer", None)) is not None:
        settings["outer_optim_spec"] = _optim("outer_optimizer", outer, "sgd")
    if sync_every is not None:
        settings["H"] = sync_every
    if config.schedule == "cosine" or config.warmup_steps:
        settings["lr_scheduler"] = "lambda_cosine"
        settings["lr_scheduler_kwargs"] = {
            "warmup_steps": config.warmup_steps,
            "cosine_anneal": config.schedule == "cosine",
        }
    made = _called(f"strategy {strategy.shown}", factory, {**settings, **given})
    if not isinstance(made, Strategy):
        raise SettingsError(f"{strategy.name} made a {type(made).__name__}, no Strategy")
    return made


def model_of(config: SimulateConfig) -> Callable[[], torch.nn.Module]:
    """What makes the model, the same whenever it is called with the same seed."""
    factory = models.MODELS.get(config.model) or found(config.model)
    return lambda: _called(f"model {config.model}", factory, config.model_options)


def data_of(config: SimulateConfig) -> tuple[Any, Any]:
    """Data sets for training and for validation.

    Raises:
        SettingsError: there is no such data, or it does not come as a pair.
    """
    name = data_name(config)
    if name is None:
        raise SettingsError(f"say what {config.model} learns from: data")
    if name == "digits":
        return datasets.digits()
    context = config.model_options.get("context", 64)
    check_integer("model_options.context", context, least=1)
    if name == "stdlib-text":
        return datasets.text(context=context)
    if ":" not in name:
        return datasets.text([Path(name)], context=context)
    pair = found(name)()
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise SettingsError(f"{name} must return a pair of data sets, for training and validation")
    return pair


def data_name(config: SimulateConfig) -> str | None:
    """The given one, or that of the model."""
    return config.data or DATA_OF.get(config.model)


def found(name: str) -> Callable[..., Any]:
    """What "package.module:name" names.

    Raises:
        SettingsError: there is no such thing.
    """
    module, _, attribute = name.partition(":")
    try:
        value = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"{name} cannot be found: {error}; is it on PYTHONPATH?") from error
    if not callable(value):
        raise SettingsError(f"{name} is a {type(value).__name__}, and not callable")
    return value


def _factory(strategy: StrategyConfig) -> Callable[..., Any]:
    return found(STRATEGIES.get(strategy.name, strategy.name))


def _inner(config: SimulateConfig, strategy: StrategyConfig, own: object, lr: float) -> OptimSpec:
    if own is not None:
        return _optim("optim", own, config.optimizer, lr=lr)
    if strategy.name in SIGNS:
        return OptimSpec.from_string("sgd", lr=lr)
    return OptimSpec.from_string(config.optimizer, lr=lr, **config.optimizer_options)


def _optim(setting: str, given: object, default: str, **more: Any) -> OptimSpec:
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        raise SettingsError(f"{setting} is {given!r}: write {setting}: {{name: sgd, lr: 0.7}}")
    arguments = {**more, **given}
    return OptimSpec.from_string(arguments.pop("name", default), **arguments)


def _called(what: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """`factory(**arguments)`; what it does not take is refused with what it does."""
    known = inspect.signature(factory).parameters
    new_names = old_names_of(factory)
    arguments = with_new_names(f"torchft simulate: {what}", arguments, new_names, settings=True)
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    unknown = sorted(arguments.keys() - known.keys())
    # What every strategy of ours takes need not be taken by one of the user's, if it is unset.
    unknown = [name for name in unknown if arguments[name] is not None]
    if unknown and not free:
        raise SettingsError(
            f"{what} has no option {', '.join(unknown)}: it takes {', '.join(sorted(known))}"
        )
    taken = {k: v for k, v in arguments.items() if free or k in known}
    try:
        return factory(**taken)
    except TypeError as error:
        lists = [f"{k}={v!r}" for k, v in taken.items() if isinstance(v, list | tuple)]
        hint = f" ({', '.join(lists)}: options are not swept; nodes, sync_every, lr and seeds are)"
        raise SettingsError(f"{what}: {error}{hint if lists else ''}") from error
