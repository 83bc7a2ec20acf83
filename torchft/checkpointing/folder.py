"""A folder of checkpoints: what is in it, and each change of it so that a crash leaves it whole.

A checkpoint is written under another name and renamed when all of it is on the disk; its manifest
comes last. Before one is deleted it is renamed too, so that no half of it is ever seen. `kept.py`
decides which.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torchft.atomic import aside, put_in_place, remove
from torchft.checkpointing import kept
from torchft.checkpointing.manifest import MANIFEST, DamagedError, Manifest, read_manifest

__all__ = ["CheckpointFolder"]


class CheckpointFolder:
    """The folder at `path`, made when the first checkpoint is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def found(self) -> Iterator[kept.Found]:
        """All checkpoints and drafts in it, in no order."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            one = kept.of(path.name, is_whole=partial(_is_whole, path))
            if one is not None:
                yield one

    def begin(self, step: int) -> Path:
        """An empty folder for the draft of a step; what a process that died left there is removed.

        Raises:
            OSError: the disk is full or broken.
        """
        draft = self.path / kept.draft_of(step)
        remove(draft)
        draft.mkdir(parents=True)
        return draft

    def finish(self, draft: Path, manifest: Manifest, keep: int) -> None:
        """Give a draft its name, in the place of a damaged one, and delete what is not kept.

        Raises:
            OSError: the disk is full or broken.
        """
        (draft / MANIFEST).write_text(manifest.to_text())
        put_in_place(draft, self.path / kept.name_of(manifest.step), sync=True)
        for one in kept.deletable(self.found(), keep):
            self._delete(one.name)

    def _delete(self, name: str) -> None:
        path = self.path / name
        if not name.startswith("."):
            with aside(path):
                pass
        remove(path)


def _is_whole(folder: Path, step: int) -> bool:
    try:
        read_manifest(folder, step)
    except DamagedError:
        return False
    return True
