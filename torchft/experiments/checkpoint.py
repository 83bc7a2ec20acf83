"""CheckpointFolder of a run: one file each, written whole or not at all, the newest few kept.

    <save_dir>/<run_name>/step_00000200.pt

Such a file holds tensors and plain data, so it loads without running code, and what experiment it
is of. Whatever the run draws follows from its seed, the node and the step, so where samples and
dropout masks go on is part of the step. A run that resumes ends with the bits of one that was
never interrupted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchft.arguments import check_integer
from torchft.atomic import replacing
from torchft.errors import SettingsError
from torchft.strategies.describe import differences_in_words

__all__ = ["CheckpointFolder", "Saved", "load_checkpoint", "write_whole"]

_FORMAT = 1
_NAME = re.compile(r"step_(\d+)\.pt")
_FIELDS = {"format", "step", "identity", "state"}


@dataclass(frozen=True)
class Saved:
    """The content of one checkpoint file of a run."""

    step: int
    identity: dict[str, Any]
    """The settings that decide about bits."""
    state: dict[str, Any]
    path: Path

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse another experiment.

        Raises:
            SettingsError: names what differs.
        """
        if found := differences_in_words(self.identity, identity):
            raise SettingsError(
                f"{self.path} is of another experiment (checkpoint → this run): {found}. Make them "
                "equal, or start afresh under another run_name"
            )


class CheckpointFolder:
    """The folder that holds the checkpoint files of one run."""

    def __init__(self, folder: str | Path, *, keep: int = 3) -> None:
        check_integer("keep_checkpoints", keep, least=1)
        self.folder = Path(folder)
        self._keep = keep

    def all(self) -> list[Path]:
        """The paths of all its checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("step_*.pt") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.stem.removeprefix("step_")))

    def save(self, step: int, identity: dict[str, Any], state: dict[str, Any]) -> Path:
        """Write, and let the oldest go.

        Raises:
            SettingsError: the state holds something that is neither tensor nor plain data.
        """
        path = self.folder / f"step_{step:08d}.pt"
        content = {"format": _FORMAT, "step": step, "identity": identity, "state": state}
        write_whole(path, content)
        for old in self.all()[: -self._keep]:
            old.unlink()
        return path

    def newest(self) -> Path | None:
        """The file with the highest step."""
        found = self.all()
        return found[-1] if found else None


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a file that loads without running code, or leave what was there as it was.

    Raises:
        SettingsError: there is something in it that is neither tensor nor plain data.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=True) as draft:
        with draft.open("wb") as file:
            torch.save(content, file)
        _check_loads(draft)


def _check_loads(path: Path) -> None:
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if unsafe:
        raise SettingsError(
            f"the state of this run holds {', '.join(sorted(unsafe))}, which does not load without "
            "running code: keep tensors and plain data in optimizers, schedules and strategies"
        )


def load_checkpoint(path: str | Path) -> Saved:
    """A file, or the newest one of a folder. Nothing in it is run.

    Raises:
        SettingsError: there is none, or it cannot be read.
    """
    at: Path | None = Path(path)
    if Path(path).is_dir():
        at = CheckpointFolder(path).newest()
    if at is None or not at.exists():
        raise SettingsError(f"no checkpoint in {path}: give its run_name, or leave resume out")
    content = _read(at)
    if content["format"] != _FORMAT:
        raise SettingsError(f"{at} is a checkpoint of format {content['format']}, not {_FORMAT}")
    return Saved(content["step"], content["identity"], content["state"], at)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever torch says of a file that is cut off, or that was never one of ours: its first
        # sentence, since the next ones advise to unpickle that.
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise SettingsError(
            f"{path} cannot be read as a checkpoint ({why}): remove it, to resume from an older one"
        ) from error
    if not isinstance(content, dict) or not content.keys() >= _FIELDS:
        raise SettingsError(f"{path} is no checkpoint of a run: give one that a Trainer wrote")
    return content
