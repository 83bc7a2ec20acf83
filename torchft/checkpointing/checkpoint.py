"""One checkpoint as a whole: the state in its files, each of them in the manifest.

    write(folder, staged, step, ranks, …)     # aside; it gets its name when all of it is there
    read(folder.path / name, step, own, ranks)

Files are compared with the manifest's hashes before anything is read from them. Nothing but the
step in its name says that the manifest is right: whoever may write to the folder decides what
training goes on from, but cannot run code in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torchft.atomic import remove
from torchft.checkpointing import dcp
from torchft.checkpointing.folder import CheckpointFolder
from torchft.checkpointing.manifest import DamagedError, File, Manifest, hash_of, read_manifest
from torchft.checkpointing.ranks import Ranks
from torchft.checkpointing.staging import Staged
from torchft.errors import CheckpointError

__all__ = ["read", "write"]


def write(
    folder: CheckpointFolder,
    staged: Staged,
    step: int,
    ranks: Ranks,
    *,
    written_by: str,
    keep: int,
) -> None:
    """Write the state of all ranks of a group, all of which call it.

    Args:
        folder: of all checkpoints.
        staged: this rank's state.
        step: of the manager. Its state is `staged`'s `["torchft"]`.
        ranks: of this group.
        written_by: the group's full replica id.
        keep: so many whole checkpoints; older ones are deleted when this one has its name.

    Raises:
        OSError: the disk is full or broken.
        CheckpointError: it failed on another rank, or the ranks are at different steps.
    """
    draft = ranks.first(lambda: folder.begin(step))
    try:
        dcp.write(draft, staged, ranks)
        manifest = Manifest(step, ranks.count, written_by, _hashes(draft, step, ranks))
        ranks.first(lambda: folder.finish(draft, manifest, keep))
    finally:
        if ranks.rank == 0:
            remove(draft)


def read(path: Path, step: int, own: Callable[[], object], ranks: Ranks) -> Any:
    """The state of this rank from a checkpoint; all ranks of a group call it.

    Args:
        path: of the checkpoint.
        step: that all of it must be of.
        own: gives the state here, which says how it is sharded; asked when all files are whole.
        ranks: of this group.

    Raises:
        CheckpointError: a file is not what the manifest says, or of another step, on any rank.
        MismatchError: it cannot be sharded as it is here.
    """
    manifest = ranks.each(partial(read_manifest, path, step))
    ranks.each(lambda: _check_named(manifest, dcp.files_of(manifest.ranks)))
    names = ranks.share(sorted(manifest.files))
    ranks.each(partial(manifest.check_hashes, path, names))
    state = dcp.read(path, own(), ranks, written_by=manifest.ranks)
    ranks.each(partial(_check_step, state, step))
    return state


def _hashes(draft: Path, step: int, ranks: Ranks) -> dict[str, File]:
    """Of all files, to which each rank gives a share; all are at the same step."""
    names = sorted(path.name for path in draft.iterdir())
    mine = ranks.share(names)
    found = ranks.together(lambda: (step, {name: hash_of(draft / name) for name in mine}))
    steps = sorted({at for at, _ in found})
    if len(steps) > 1:
        raise CheckpointError(f"the ranks of this group are at steps {steps}")
    return {name: file for _, share in found for name, file in share.items()}


def _check_named(manifest: Manifest, names: set[str]) -> None:
    """What is read regardless of the manifest is in it."""
    if missing := sorted(names - manifest.files.keys()):
        raise DamagedError(f"the manifest lacks {missing}")


def _check_step(state: Any, step: int) -> None:
    at = state["torchft"]["step"]
    if at != step:
        raise DamagedError(f"its state is of step {at}")
