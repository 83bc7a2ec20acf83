"""fp32 master weights in the optimizers that somebody made over half-precision parameters.

The backups of such parameters are fp32 (`precision.py`), so what is stepped must be, too: in the
optimizers' groups each parameter gives its place to a master, which is a view of the backup. That
takes no memory beside the backup, and an optimizer's state, also one that is loaded later, gets the
masters' dtype. They lie where the backup does, and are stepped there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchft.errors import SettingsError
from torchft.sharded import is_sharded
from torchft.strategies.model_local import like_parameter
from torchft.strategies.parts.coupling import Maker, sees_shapes

__all__ = ["masters_of", "restored_on_error", "take_over"]


def masters_of(
    parameters: Iterable[nn.Parameter], views: Iterable[Tensor], optimizer: Optimizer
) -> list[nn.Parameter]:
    """A master for each of `parameters` over its view of the backup.

    Raises:
        SettingsError: a parameter is sharded, the backup lies on another kind of device than its
            mesh, and the optimizer may look at more than single elements.
    """
    pairs = zip(parameters, views, strict=True)
    return [nn.Parameter(_like(view, parameter, optimizer)) for parameter, view in pairs]


def _like(view: Tensor, parameter: Any, optimizer: Optimizer) -> Tensor:
    if not is_sharded(parameter) or parameter.device_mesh.device_type == view.device.type:
        return like_parameter(view, parameter)
    if sees_shapes(_maker(optimizer)):
        shards_on = parameter.device_mesh.device_type
        raise SettingsError(
            f"{type(optimizer).__name__} would step each shard of a half-precision parameter on "
            f"its own, since the backup is on {view.device.type} and the shards are on "
            f"{shards_on}: give backup_device=torch.device({shards_on!r}), or "
            "shared_dtype=None"
        )
    return view


def _maker(optimizer: Optimizer) -> Maker:
    """Makes others like it."""
    cls, takes = type(optimizer), inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in takes}
    return lambda parameters: cls(parameters, **options)


@torch.no_grad()
def take_over(optimizer: Optimizer, masters: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put the masters in the places of their parameters, with the state that these have."""
    for group in optimizer.param_groups:
        group["params"] = [masters.get(p, p) for p in group["params"]]
    for parameter, master in masters.items():
        if parameter in optimizer.state:
            state = optimizer.state.pop(parameter)
            optimizer.state[master] = {name: _as(master, old) for name, old in state.items()}


def _as(master: nn.Parameter, value: Any) -> Any:
    fits = isinstance(value, Tensor) and value.shape == master.shape and value.is_floating_point()
    return value.to(master.device, master.dtype) if fits else value


@contextmanager
def restored_on_error(flats: Sequence[Tensor]) -> Iterator[None]:
    """What is half stepped when an optimizer raises goes back to what it was."""
    before = [flat.clone() for flat in flats]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for flat, value in zip(flats, before, strict=True):
                flat.copy_(value)
        raise
