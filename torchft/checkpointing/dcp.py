"""A state in a folder, written and read by `torch.distributed.checkpoint`.

    rank-0.json, …    each rank's tree of plain values, and under which key each leaf lies
    *.distcp          tensors by key, as torch writes them; .metadata: where each one is

A DTensor has one key on all ranks, by its place in the state: every rank writes its shards, and who
reads may be sharded in another way. Whatever else is in a state is each rank's own. What is equal
to a value of rank 0 is written by that one alone.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from torch import Tensor

from torchft.checkpointing.layout import DTYPES
from torchft.checkpointing.ranks import Ranks
from torchft.checkpointing.resharded import Places
from torchft.checkpointing.staging import Staged
from torchft.checkpointing.tensor_index import TensorReader
from torchft.checkpointing.tree import decode, tensors_of
from torchft.digest import digest
from torchft.errors import CheckpointError

__all__ = ["files_of", "read", "write", "write_synced"]

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# It says that no process group is used, which is what we ask it for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unini")


def write(folder: Path, staged: Staged, ranks: Ranks) -> None:
    """Write the state of each rank into `folder`, which is empty; all ranks call it.

    Raises:
        OSError: the disk is full or broken.
        CheckpointError: it failed in torch, or on another rank.
    """
    tensors, keys = _keyed(staged, ranks)
    writer = torch_dcp.FileSystemWriter(folder, sync_files=True)
    with _causes():
        torch_dcp.save(
            tensors, storage_writer=writer, process_group=ranks.pg, no_dist=ranks.pg is None
        )
    described = [
        {"key": key, "dtype": _DTYPE_NAMES[leaf.dtype], "shape": list(leaf.shape)}
        for key, leaf in zip(keys, staged.leaves, strict=True)
    ]
    text = json.dumps({"tree": staged.tree, "leaves": described})
    ranks.each(lambda: write_synced(_file_of(folder, ranks.rank), text))


def write_synced(path: Path, text: str) -> None:
    """Write a file, and return when it is on the disk.

    Raises:
        OSError: the disk is full or broken.
    """
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path, own: object, ranks: Ranks, *, written_by: int) -> Any:
    """The state of this rank; all ranks call it. Tensors are fresh memory on the CPU, DTensors over
    meshes that equal those of `own` and do not communicate.

    Args:
        folder: what `write` wrote.
        own: the state of this rank before, which says how it is sharded here.
        ranks: of this group. A rank that the writing group did not have reads what rank 0 wrote.
        written_by: how many ranks have written it.

    Raises:
        MismatchError: it cannot be sharded as it is here.
        CheckpointError: it cannot be read, on this rank or another one.
    """
    source = ranks.rank if ranks.rank < written_by else 0
    saved = ranks.each(lambda: json.loads(_file_of(folder, source).read_text()))
    tree, described = saved["tree"], saved["leaves"]
    dtypes = {index: DTYPES[leaf["dtype"]] for index, leaf in enumerate(described)}
    targets = ranks.each(lambda: list(Places(own).targets(tree, dtypes)))
    sharded = {target.node[1] for target in targets}
    wanted: dict[str, Tensor] = {
        leaf["key"]: torch.empty(leaf["shape"], dtype=dtypes[index], device="cpu")
        for index, leaf in enumerate(described)
        if index not in sharded
    }
    wanted |= {described[target.node[1]]["key"]: target.tensor for target in targets}
    reader = TensorReader(folder)
    with _causes():
        torch_dcp.load(
            wanted, storage_reader=reader, process_group=ranks.pg, no_dist=ranks.pg is None
        )
    leaves = _leaves([leaf["key"] for leaf in described], wanted)
    for target in targets:
        target.settle(leaves)
    return decode(tree, leaves)


def files_of(ranks: int) -> set[str]:
    """The files that `read` needs of a checkpoint that so many ranks have written, whatever it
    holds."""
    return {".metadata", *(_file_of(Path(), rank).name for rank in range(ranks))}


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _keyed(staged: Staged, ranks: Ranks) -> tuple[dict[str, Tensor], list[str]]:
    """What this rank writes, by key, and the key of each of its leaves."""
    keys = [f"rank {ranks.rank}/{index}" for index in range(len(staged.leaves))]
    tensors: dict[str, Tensor] = {}
    sharded: set[int] = set()
    for path, node in tensors_of(staged.tree):
        if node[0] == "dtensor":
            _, index, cut, (mesh, _), _ = node
            keys[index] = f"sharded/{json.dumps(path)}"
            on_cpu = ["dtensor", index, cut, [mesh, "cpu"], None]
            tensors[keys[index]] = decode(on_cpu, staged.leaves)
            sharded.add(index)
    own = [index for index in range(len(keys)) if index not in sharded]
    _name_as_rank_0(keys, own, staged.leaves, ranks)
    mine = f"rank {ranks.rank}/"
    return tensors | {keys[i]: staged.leaves[i] for i in own if keys[i].startswith(mine)}, keys


def _name_as_rank_0(keys: list[str], own: list[int], leaves: list[Tensor], ranks: Ranks) -> None:
    """Give leaves that rank 0 has as well its keys, so that they are written once."""
    if ranks.count == 1:
        return
    digests = {index: digest(leaves[index]) for index in own}
    theirs = ranks.first(lambda: {digests[index]: keys[index] for index in own})
    for index in own if ranks.rank else ():
        keys[index] = theirs.get(digests[index], keys[index])


def _leaves(keys: list[str], loaded: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensor of each key; those that were written once are separate again."""
    seen: set[str] = set()
    leaves = []
    for key in keys:
        leaves.append(loaded[key].clone() if key in seen else loaded[key])
        seen.add(key)
    return leaves


@contextmanager
def _causes() -> Iterator[None]:
    """torch's error of all ranks as ours, with the first cause."""
    try:
        yield
    except torch_dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"{type(cause).__name__}: {cause} (on rank {rank})") from cause
