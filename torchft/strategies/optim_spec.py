"""An optimizer to be made later, elsewhere, several times: its class and its arguments.

    OptimSpec(torch.optim.AdamW, lr=1e-3)      OptimSpec.from_string("adamw", lr=1e-3)

It pickles, so it travels to the processes that build from it. Where torch has a fused kernel for
the class and the device, and the arguments do not say otherwise, that one is taken: the same in
every runtime, so that all compute the same bits, and the fastest on a CPU too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torchft.arguments import check_choice
from torchft.errors import SettingsError
from torchft.step_hooks import check_no_closure

__all__ = ["OptimSpec", "ensure_optim_spec"]

_NAMES = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
_FUSED_ON: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.Adam: {"cpu", "cuda"},
    torch.optim.AdamW: {"cpu", "cuda"},
    torch.optim.SGD: {"cpu", "cuda"},
    torch.optim.Adagrad: {"cpu"},
}


class OptimSpec:
    """`cls(parameters, **kwargs)`, when there are parameters.

    Raises:
        SettingsError: `cls` is no optimizer class, does not take one of the arguments, or asks for
            the loss in its step.
    """

    def __init__(self, cls: type[torch.optim.Optimizer] = torch.optim.AdamW, **kwargs: Any) -> None:
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise SettingsError(f"OptimSpec needs an optimizer class such as AdamW, not {cls!r}")
        check_arguments(cls, kwargs)
        _check_rate(cls, kwargs.get("lr"))
        check_no_closure(cls)
        self.cls = cls
        self.kwargs = kwargs

    @classmethod
    def from_string(cls, name: str, **kwargs: Any) -> OptimSpec:
        """By name: adam, adamw, sgd, rmsprop or adagrad, in any case.

        Raises:
            SettingsError: another name.
        """
        return cls(_NAMES[check_choice("optimizer", name.lower(), _NAMES)], **kwargs)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> OptimSpec:
        """What `optimizer` was made with: its class, and the defaults of its groups."""
        spec = cls.__new__(cls)  # it was made, so there is nothing to check
        known = inspect.signature(type(optimizer)).parameters
        spec.cls = type(optimizer)
        spec.kwargs = {k: v for k, v in optimizer.defaults.items() if k in known}
        return spec

    def build(self, parameters: nn.Module | Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`, or over those of a model.

        Raises:
            SettingsError: its class refuses them, or a value of an argument.
        """
        if isinstance(parameters, nn.Module):
            parameters = parameters.parameters()
        params = list(parameters)
        # A rate that is a tensor is written by schedules, so no two optimizers share one.
        own: dict[str, Any] = {k: _own(v) for k, v in self.kwargs.items()}
        try:
            return self.cls(params, **{**self._fused(params), **own})
        except (TypeError, ValueError) as error:
            lists = [name for name, value in self.kwargs.items() if isinstance(value, list)]
            hint = f" ({', '.join(lists)}: a list in the place of one value)" if lists else ""
            raise SettingsError(f"{self!r} cannot be made: {error}{hint}") from error

    def config(self) -> dict[str, Any]:
        """The settings as plain data; arguments that are none are written out."""
        return {"name": self.cls.__name__, **{k: plain(v) for k, v in self.kwargs.items()}}

    def __call__(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The same as `build`: a spec serves wherever an optimizer factory does."""
        return self.build(parameters)

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.kwargs.items())
        return f"OptimSpec({self.cls.__name__}{given})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OptimSpec) and (self.cls, self.kwargs) == (other.cls, other.kwargs)

    __hash__ = None  # type: ignore[assignment]

    def _fused(self, params: list[nn.Parameter]) -> dict[str, bool]:
        spoken = self.kwargs.keys() & {"fused", "foreach", "differentiable"}
        if spoken or isinstance(self.kwargs.get("lr"), torch.Tensor):
            return {}
        devices = _FUSED_ON.get(self.cls, set())
        fits = all(p.device.type in devices and p.is_floating_point() for p in params)
        return {"fused": True} if fits and params else {}


def _check_rate(cls: type, lr: object) -> None:
    if isinstance(lr, list | tuple | str):
        raise SettingsError(
            f"{cls.__name__}: lr={lr!r} must be one number; to compare several, make a run of "
            "each, as torchft simulate does with its own lr: [1e-3, 1e-4]"
        )


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def check_arguments(cls: type, kwargs: dict[str, Any]) -> None:
    """`cls(one, **kwargs)` is a call that `cls` takes.

    Raises:
        SettingsError: it has no such argument, or misses one.
    """
    try:
        inspect.signature(cls).bind(None, **kwargs)
    except TypeError as error:
        raise SettingsError(f"{cls.__name__}: {error}") from None


def plain(value: object) -> object:
    """`value` as a logger can write it."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    simple = value is None or isinstance(value, bool | int | float | str)
    return value if simple else repr(value)


def ensure_optim_spec(
    given: str | OptimSpec | type[torch.optim.Optimizer] | None,
    default: OptimSpec | None = None,
    **kwargs: Any,
) -> OptimSpec:
    """A spec from whatever stands for one: a spec, a name, a class, or None for the default.

    Raises:
        SettingsError: something else, or arguments beside a spec that has its own.
    """
    if given is None:
        return default if default is not None else OptimSpec(**kwargs)
    if isinstance(given, str):
        return OptimSpec.from_string(given, **kwargs)
    if isinstance(given, OptimSpec):
        if kwargs:
            raise SettingsError(f"{given!r} has its own arguments: leave out {', '.join(kwargs)}")
        return given
    return OptimSpec(given, **kwargs)
