"""torch's index of the tensors in a folder, read without running what it says.

The file `.metadata` is a pickle, in which anything callable may be named. Here nothing is but the
classes of an index of tensors; the tensors themselves torch reads with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from torchft.errors import CheckpointError

__all__ = ["TensorReader"]

_PATHS = frozenset({"PosixPath", "WindowsPath"})
_ALLOWED = {
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "torch": frozenset({"Size"}),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.serialization": frozenset({"_get_layout"}),
}
"""By module. Values that are no tensors are not among them: torch unpickles those."""


class TensorReader(FileSystemReader):
    """torch's reader of a folder that holds tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index.

        Raises:
            CheckpointError: it names what no index of tensors has.
            OSError: it cannot be read.
        """
        with Path(self.path, ".metadata").open("rb") as file:
            index = cast(Metadata, _Unpickler(file).load())
        assert index.storage_meta is not None
        index.storage_meta.load_id = self.load_id
        return index


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f".metadata names {module}.{name}, which no index of tensors has: it is not read"
        )
