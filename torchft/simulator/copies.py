"""Copies of models: one for each node at the start, and one for the mean at any time.

A tensor that was computed with a graph behind it (`self.last_loss`, the weight of an old-style
`weight_norm`) has no copy of its own, says torch. At the start it would be a guess to cut it off,
since the forward pass may use it, so a model with one is refused unless a factory can make it anew;
but what a hook computes in every forward pass is cut off. Later, when weights are all that is
wanted of a copy, all such tensors are cut off, and what cannot be copied even so is made anew.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchft.errors import SettingsError

__all__ = ["Remake", "copied", "made_alike", "weights_copied"]

Remake = Callable[[], nn.Module]
"""Makes the model anew, as it was before training."""


def copied(model: nn.Module, shared: dict[int, Any] | None = None) -> nn.Module:
    """A copy of `model`, but for what is `shared`, by id.

    Raises:
        SettingsError: it cannot be copied; names the attribute where it is known.
    """
    try:
        with _Detached(_of_hooks(model)):
            return copy.deepcopy(model, shared)
    except Exception as error:  # whatever a module's own parts raise
        name = next(iter(_computed(model)), None)
        why = str(error) if name is None else f"{name} is a tensor that was computed from others"
        raise SettingsError(
            f"the model {type(model).__name__} cannot be copied for each node: {why}. Give a "
            "factory in its place, a function without arguments that makes the model, and each "
            "node gets one of its own; or keep locks, files and computed tensors out of its "
            "attributes (what a forward pass left there: set it to None), or give it a __deepcopy__"
        ) from error


def made_alike(model: nn.Module, remake: Remake) -> nn.Module:
    """What `remake` makes, with the weights and buffers of `model`.

    Raises:
        SettingsError: it makes another model.
    """
    made = remake()
    _load(made, model)
    return made


def weights_copied(model: nn.Module, remake: Remake | None = None) -> nn.Module:
    """A copy of `model` for its weights' sake: computed tensors in it are cut off from their graph.
    One that cannot be copied is made anew, with a warning.

    Raises:
        SettingsError: it cannot be copied, and there is no `remake`.
    """
    try:
        with _Detached(None):
            return copy.deepcopy(model)
    except Exception as error:  # whatever has become of a module's parts
        if remake is None:
            raise SettingsError(
                f"the model {type(model).__name__} cannot be copied ({error}): keep locks, files "
                "and generators out of its attributes"
            ) from error
        warnings.warn(
            f"{type(model).__name__} cannot be copied ({error}): the mean of all nodes is in one "
            "that is made anew, which has weights and buffers, and nothing else that it kept",
            stacklevel=2,
        )
        return made_alike(model, remake)


class _Detached(TorchFunctionMode):
    """Inside, `deepcopy` cuts computed tensors off from their graph: those of `only`, by id, or
    all."""

    def __init__(self, only: Collection[int] | None) -> None:
        super().__init__()
        self._only = only

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and self._cuts(args[0]):
            tensor, memo = args
            memo[id(tensor)] = detached = tensor.detach().clone()
            return detached
        return func(*args, **(kwargs or {}))

    def _cuts(self, tensor: Tensor) -> bool:
        return not tensor.is_leaf and (self._only is None or id(tensor) in self._only)


def _of_hooks(model: nn.Module) -> set[int]:
    """Attributes that a forward pre-hook sets anew, as torch's old weight_norm and spectral_norm
    do: such a hook has the attribute's name."""
    return {
        id(value)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(value := vars(module).get(getattr(hook, "name", "")), Tensor)
    }


def _computed(model: nn.Module) -> Iterator[str]:
    """Names of the attributes that hold a tensor with a graph behind it."""
    known = _of_hooks(model)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if any(not t.is_leaf and id(t) not in known for t in _tensors(value)):
                yield f"{path}.{name}" if path else name


def _tensors(value: object, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for inside in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inside, depth - 1)


@torch.no_grad()
def _load(made: nn.Module, model: nn.Module) -> None:
    for kind in ("parameters", "buffers"):
        mine = dict(getattr(made, f"named_{kind}")())
        theirs = dict(getattr(model, f"named_{kind}")())
        shapes = [{k: (t.shape, t.dtype) for k, t in one.items()} for one in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise SettingsError(
                f"{type(model).__name__} cannot be made anew: its factory makes other {kind} "
                "than those of the model that trained"
            )
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
