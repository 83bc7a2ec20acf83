"""Where the sharded tensors of a checkpoint go here, if this group is sharded in another way.

A tensor goes to what is registered here in its place: cut as that is, or whole where that is whole.
Moments of an optimizer that has not stepped have no counterpart yet: they are cut as they were,
over the mesh here of the same dimension names, or whole where nothing here is sharded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchft.checkpointing.tree import Path, in_words, read_sharding, tensors_of, write_sharding
from torchft.errors import MismatchError
from torchft.sharded import Sharding, is_dtensor, local_part, mesh_of

__all__ = ["Places", "Target"]


@dataclass(frozen=True)
class Target:
    """Memory for one sharded tensor of a checkpoint."""

    node: list[Any]
    """What stands for it in the checkpoint's tree."""
    tensor: Tensor
    """A DTensor, or a plain tensor: to be filled."""

    def settle(self, leaves: list[Tensor]) -> None:
        """Have the tree name this tensor, and put what lies here of it among `leaves`."""
        _, index, _, _, grad = self.node
        leaves[index] = local_part(self.tensor)
        if not is_dtensor(self.tensor):
            self.node[:] = ["tensor", index] if grad is None else ["parameter", index, grad]
            return
        mesh: Any = self.tensor.device_mesh  # type: ignore[attr-defined]
        leaves.append(mesh.mesh)
        cut = write_sharding(Sharding.of(self.tensor))
        self.node[:] = ["dtensor", index, cut, [len(leaves) - 1, mesh.device_type], grad]


class Places:
    """The tensors that are registered here, by place; `own` is the state of this rank."""

    def __init__(self, own: object) -> None:
        self._own = dict(_tensors_in(own, ()))
        sharded = [one.device_mesh for one in self._own.values() if is_dtensor(one)]
        self._meshes = {mesh.mesh_dim_names: mesh for mesh in sharded}

    def targets(self, tree: Any, dtypes: Mapping[int, torch.dtype]) -> Iterator[Target]:
        """Memory for each sharded tensor of a checkpoint's tree; `dtypes`: of its leaves.

        Raises:
            MismatchError: a tensor has another shape here, is whole in the checkpoint and sharded
                here, or there is no mesh here that it could be cut over.
        """
        for path, node in tensors_of(tree):
            own = self._own.get(path)
            if node[0] == "dtensor":
                cut = read_sharding(node[2])
                yield Target(node, self._tensor(path, cut, own, dtypes[node[1]]))
            elif own is not None and is_dtensor(own):
                raise MismatchError(
                    f"{in_words(path)} is a plain tensor in the checkpoint and {Sharding.of(own)} "
                    "here: load it into the model before it is sharded, or start from the weights"
                )

    def _tensor(self, path: Path, cut: Sharding, own: Any, dtype: torch.dtype) -> Tensor:
        if own is not None and tuple(own.shape) != cut.shape:
            raise MismatchError(
                f"{in_words(path)} is {list(cut.shape)} in the checkpoint and {list(own.shape)} "
                "here: build the model that it was written with"
            )
        if own is not None and is_dtensor(own):
            here = Sharding.of(own)
            part = torch.empty(local_part(own).shape, dtype=dtype, device="cpu")
            return here.join(part, _on_cpu(own.device_mesh))
        if own is not None or not self._meshes:
            return torch.empty(cut.shape, dtype=dtype, device="cpu")
        return self._as_it_was(path, cut, dtype)

    def _as_it_was(self, path: Path, cut: Sharding, dtype: torch.dtype) -> Tensor:
        from torch.distributed.tensor import empty

        mesh = self._meshes.get(cut.names)
        if mesh is None or mesh.ndim != len(cut.placements):
            raise MismatchError(
                f"{in_words(path)} is {cut} in the checkpoint, and here there are only "
                f"{', '.join(map(str, self._meshes.values()))}: give the mesh the same dimensions"
            )
        placements = cut.placed()
        return empty(cut.shape, dtype=dtype, device_mesh=_on_cpu(mesh), placements=placements)


def _on_cpu(mesh: Any) -> Any:
    return mesh_of(mesh.mesh, "cpu", mesh.mesh_dim_names)


def _tensors_in(value: object, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_in(inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _tensors_in(inner, (*path, str(i)))
