"""A received state, with its DTensors over the meshes of the process that received it.

A DTensor arrives over a mesh that only looks like the donor's. Ours has in the same place a tensor
that is cut alike, whose mesh it then gets; where ours has none yet, as in an optimizer that has not
stepped, it gets the one of our meshes that has the same shape and names. A tensor that is cut in
another way, or only on one side, is refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchft.checkpointing.tree import Path, check_cut, in_words
from torchft.errors import MismatchError
from torchft.sharded import Sharding, is_dtensor, local_part

__all__ = ["holds_dtensor", "on_own_mesh"]


def holds_dtensor(state: object) -> bool:
    """Whether there is a DTensor in a state."""
    return any(map(is_dtensor, tree_leaves(state)))


def on_own_mesh(received: Any, own: object, path: Path = ()) -> Any:
    """`received` with each of its DTensors over a mesh of `own`; its dicts and lists are changed.

    Args:
        received: what a transport returned.
        own: the state of this process, before `received` is loaded. None: there is none, and
            DTensors stay as they came, which is good for reading and copying them.
        path: where both are in the state dict, for errors.

    Raises:
        MismatchError: a tensor is cut in another way here; names it, and how on both sides.
    """
    return _OwnMeshes(own).put(received, own, path)


class _OwnMeshes:
    def __init__(self, own: object) -> None:
        meshes = [leaf.device_mesh for leaf in tree_leaves(own) if is_dtensor(leaf)]
        self._meshes: dict[tuple[object, ...], Any] = {
            (tuple(mesh.shape), mesh.mesh_dim_names): mesh for mesh in meshes
        }

    def put(self, value: Any, own: object, path: Path) -> Any:
        if isinstance(value, Tensor):
            return self._put_tensor(value, own, path)
        if isinstance(value, dict):
            ours = own if isinstance(own, Mapping) else {}
            for key, inner in value.items():
                value[key] = self.put(inner, ours.get(key), (*path, key))
        elif isinstance(value, list | tuple):
            at = own if isinstance(own, list | tuple) else ()
            items = [
                self.put(inner, at[i] if i < len(at) else None, (*path, i))
                for i, inner in enumerate(value)
            ]
            if isinstance(value, list):
                value[:] = items
            elif type(value) is tuple:
                return tuple(items)
        return value

    def _put_tensor(self, value: Any, own: Any, path: Path) -> Any:
        cut = Sharding.of(value) if is_dtensor(value) else None
        if isinstance(own, Tensor):
            check_cut(path, cut, Sharding.of(own) if is_dtensor(own) else None)
        if cut is None:
            return value
        if isinstance(own, Tensor):
            _check_part(path, local_part(value), local_part(own))
        mesh = own.device_mesh if is_dtensor(own) else self._mesh_for(value, cut, path)
        made = cut.join(local_part(value), mesh)
        is_parameter = isinstance(value, nn.Parameter)
        return nn.Parameter(made, requires_grad=value.requires_grad) if is_parameter else made

    def _mesh_for(self, value: Any, cut: Sharding, path: Path) -> Any:
        if not self._meshes:
            return value.device_mesh
        try:
            return self._meshes[cut.mesh, cut.names]
        except KeyError:
            ours = ", ".join(str(mesh) for mesh in self._meshes.values())
            raise MismatchError(
                f"{in_words(path)} is {cut} at the donor, and there is no such mesh here, only "
                f"{ours}: give every group the same mesh"
            ) from None


def _check_part(path: Path, theirs: Tensor, ours: Tensor) -> None:
    if theirs.shape != ours.shape:
        raise MismatchError(
            f"{in_words(path)}: this rank's part is {list(theirs.shape)} at the donor and "
            f"{list(ours.shape)} here: order the ranks of the mesh alike in every group"
        )
