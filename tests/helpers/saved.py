"""Checkpoints of a small state, written and read by one process without a manager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torchft.checkpointing import checkpoint, kept
from torchft.checkpointing.folder import CheckpointFolder
from torchft.checkpointing.ranks import Ranks
from torchft.checkpointing.staging import Staging
from torchft.errors import CheckpointError

__all__ = ["FILES", "load", "names", "newest", "save"]

FILES = [".metadata", "__0_0.distcp", "rank-0.json"]
"""Of one checkpoint, beside its manifest."""


def state(step: int) -> dict[str, Any]:
    model = {"weight": torch.full((50,), float(step)), "version": step}
    return {"user": {"model": model}, "beside": {}, "torchft": {"step": step}}


def save(folder: Path, step: int, keep: int = 1) -> None:
    staging = Staging()
    staging.copy(state(step))
    where = CheckpointFolder(folder)
    checkpoint.write(where, staging.staged, step, Ranks(), written_by="group_0", keep=keep)


def load(path: Path, step: int) -> int:
    """See that all of a checkpoint is of that step, which is returned."""
    found = checkpoint.read(path, step, lambda: None, Ranks())
    assert found["user"]["model"]["version"] == step
    assert torch.equal(found["user"]["model"]["weight"], torch.full((50,), float(step)))
    return step


def newest(folder: Path) -> int:
    for one in kept.newest_first(CheckpointFolder(folder).found()):
        try:
            return load(folder / one.name, one.step)
        except CheckpointError:
            pass
    raise AssertionError("no checkpoint is whole")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
