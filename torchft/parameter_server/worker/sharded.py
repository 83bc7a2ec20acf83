"""Parameters as a group of ranks holds them: all at each (DDP), or sharded (FSDP2, DTensor).

The server always sees complete ones, under the names that the model has without a wrapper.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchft.errors import SettingsError
from torchft.parameter_server.worker.ranks import ALONE, Ranks
from torchft.sharded import is_sharded, local_part
from torchft.strategies.model_local import ModelLocal

__all__ = ["complete", "named_parameters", "unwrapped", "write_shard"]


def complete(parameter: Any) -> Tensor:
    """The complete parameter; all ranks call this together for a sharded one."""
    return parameter.full_tensor() if is_sharded(parameter) else parameter


def write_shard(parameter: Any, new: Tensor) -> None:
    """Write `new`, complete and of any dtype, into what this rank holds of a parameter."""
    part = new.to(parameter.device, parameter.dtype)
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        # No rank sends anything: each has all of it.
        part = distribute_tensor(part, mesh, placements, src_data_rank=None).to_local()
    local_part(parameter).copy_(part)


def named_parameters(model: nn.Module, ranks: Ranks = ALONE) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: a tied weight once, no frozen ones, no buffers.

    Raises:
        SettingsError: if there is nothing to train, a parameter is no float or has no memory, or it
            is sharded over ranks that are not all `ranks`.
    """
    local = ModelLocal([unwrapped(model)])
    found = dict(zip(local.names, local.parameters, strict=True))
    for name, parameter in found.items():
        if is_sharded(parameter):
            _check_mesh(name, parameter, ranks)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel and torch.compile have wrapped.

    Raises:
        SettingsError: if FSDP1 has wrapped it.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    if isinstance(compiled_from := getattr(model, "_orig_mod", None), nn.Module):
        return unwrapped(compiled_from)  # the same parameters
    kinds = {type(module).__name__ for module in model.modules()}
    if "FullyShardedDataParallel" in kinds:
        raise SettingsError(
            "FSDP1 hides the model's parameters in flat ones, which no other worker has: shard it "
            "with torch.distributed.fsdp.fully_shard"
        )
    return model


def _check_mesh(name: str, parameter: Any, ranks: Ranks) -> None:
    mesh = sorted(int(rank) for rank in parameter.device_mesh.mesh.flatten())
    others = set(mesh) - set(ranks.members)
    if others:
        raise SettingsError(
            f"{name} is sharded over ranks {mesh}, and the worker's process_group has only "
            f"{ranks.members}: give it a group with all of them"
        )
