"""Tensors that are cut over the ranks of a group: DTensors, of FSDP2 and tensor parallelism.

Importing `torch.distributed.tensor` takes longer than all of ours, and most runs have no DTensor:
so they are known by what they can do, and the module is imported only where there is one.

    Sharding.of(weight)             # [8, 4] as shard(0) over fsdp=2
    Sharding.of(weight).join(part, mesh)        # the DTensor whose local part here is `part`
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from torchft.errors import MismatchError

__all__ = [
    "Sharding",
    "gradient_part",
    "is_any_fully_sharded",
    "is_dtensor",
    "is_sharded",
    "local_part",
    "mesh_of",
    "reshard",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this rank may hold only a part."""
    return hasattr(tensor, "to_local")


def is_dtensor(value: object) -> bool:
    """Whether a value is torch's DTensor itself, a parameter or not, and no subclass of it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(value) is module.DTensor


def is_any_fully_sharded() -> bool:
    """Whether `fully_shard` was applied to a module in this process."""
    module = sys.modules.get("torch.distributed.fsdp")
    # It gives each kind of module a class of its own.
    return module is not None and bool(module.FSDPModule.__subclasses__())


def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a sharded tensor, and others as they are; detached, and sharing
    storage."""
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()


def gradient_part(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter's gradient, sharing storage; a missing one becomes zeros.

    A gradient that is a partial sum over the ranks, as tensor parallelism makes them, is reduced
    first: all ranks of the mesh call this.
    """
    grad: Any = parameter.grad
    if grad is None:
        parameter.grad = torch.zeros_like(parameter)
    elif is_sharded(parameter):
        placements = parameter.placements  # type: ignore[attr-defined]
        if grad.placements != placements:
            parameter.grad = grad.redistribute(placements=placements)
    return local_part(parameter.grad)


def reshard(module: nn.Module) -> None:
    """Show the shards of all that FSDP2 has gathered: after a forward pass without a backward pass
    the gathered parameters of some modules stay in their place."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for child in module.modules():
            if isinstance(child, fsdp.FSDPModule):
                child.reshard()


@dataclass(frozen=True)
class Sharding:
    """How a DTensor is cut, as far as two groups must agree on it. It prints as a description."""

    shape: tuple[int, ...]
    """Of the tensor as a whole."""
    stride: tuple[int, ...]
    """Of the tensor as a whole, in elements."""
    mesh: tuple[int, ...]
    """The mesh's size along each of its dimensions."""
    names: tuple[str, ...] | None
    """The names of the mesh's dimensions, where it has them."""
    placements: tuple[tuple[str | int, ...], ...]
    """For each dimension of the mesh `("replicate",)`, `("shard", tensor dimension)`, or
    `("strided_shard", tensor dimension, split factor)`."""

    @classmethod
    def of(cls, tensor: Any) -> Sharding:
        """The sharding of a DTensor.

        Raises:
            TypeError: the values that it stands for are not there yet, as in a partial sum.
        """
        mesh = tensor.device_mesh
        return cls(
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tuple(mesh.shape),
            mesh.mesh_dim_names,
            tuple(_described(placement) for placement in tensor.placements),
        )

    def join(self, local: Tensor, mesh: Any) -> Any:
        """The DTensor over `mesh` that has `local` as the part of this rank, on whatever device
        that lies.

        Raises:
            ValueError: the sharding contradicts itself.
        """
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

        if not len(self.placements) == len(self.mesh) == mesh.ndim:
            raise ValueError(f"{len(self.placements)} placements over a mesh of {mesh.ndim}")
        # DTensor.from_local would move `local` to the mesh's device: twice the model in its memory.
        meta = TensorMeta(Size(self.shape), self.stride, local.dtype)
        spec: Any = DTensorSpec(mesh, self.placed(), tensor_meta=meta)
        return DTensor(local, spec, requires_grad=False)

    def placed(self) -> tuple[Any, ...]:
        """torch's placement for each dimension of the mesh.

        Raises:
            ValueError: one is described in an unknown way.
        """
        return tuple(_placement(described) for described in self.placements)

    def __str__(self) -> str:
        cut = ", ".join(f"{kind}({', '.join(map(str, at))})" for kind, *at in self.placements)
        over = "x".join(map(str, self.mesh))
        if self.names:
            over = ", ".join(f"{n}={size}" for n, size in zip(self.names, self.mesh, strict=True))
        return f"{list(self.shape)} as {cut} over {over}"


def mesh_of(ranks: Tensor, device: str, names: tuple[str, ...] | None) -> Any:
    """A mesh that equals the one with these ranks and names, without process groups of its own:
    for tensors whose values are read, but that do not communicate.

    Raises:
        MismatchError: this process has no rank, which torch before 2.9 asks for.
    """
    from torch.distributed import is_initialized
    from torch.distributed.device_mesh import DeviceMesh

    # Without torch.distributed there is no rank to ask for: any of the mesh will do.
    rank: dict[str, Any] = {} if is_initialized() else {"_rank": int(ranks.flatten()[0])}
    if rank and "_rank" not in inspect.signature(DeviceMesh.__init__).parameters:
        raise MismatchError(
            "the state holds DTensors, and this process has not initialized torch.distributed: "
            "shard the model in every group or in none"
        )
    return DeviceMesh(device, ranks, mesh_dim_names=names, _init_backend=False, **rank)


def _described(placement: Any) -> tuple[str | int, ...]:
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    kind = type(placement)
    if kind is Replicate:
        return ("replicate",)
    if kind is Shard:
        return ("shard", placement.dim)
    if kind is _StridedShard:
        return ("strided_shard", placement.dim, placement.split_factor)
    raise TypeError(f"a DTensor with placement {placement} has no values of its own: redistribute")


def _placement(described: tuple[str | int, ...]) -> Any:
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

    match described:
        case ("replicate",):
            return Replicate()
        case ("shard", int(dim)):
            return Shard(dim)
        case ("strided_shard", int(dim), int(factor)):
            return _StridedShard(dim, split_factor=factor)
    raise ValueError(f"no placement is described as {described}")
