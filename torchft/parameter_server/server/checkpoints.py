"""Checkpoints that are complete or not there: written aside, forced to disk, then renamed.

    <output>/checkpoints/checkpoint-<number>/
        server_state.bin     all that a restart needs, in the layout of `torchft.checkpointing`
        model.safetensors    the weights in the model's own dtypes, for other tools
        manifest.json        sizes and SHA-256 of the two

The newest one whose files are as its manifest says is taken; one that is not is named in a warning,
and the next older one is looked at.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchft.atomic import remove, replacing
from torchft.checkpointing.layout import LayoutError
from torchft.checkpointing.state_file import read_state, write_state
from torchft.errors import SettingsError

__all__ = ["Checkpoints", "load"]

logger = logging.getLogger(__name__)

STATE, MODEL, MANIFEST = "server_state.bin", "model.safetensors", "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """The checkpoints of one output folder, of which the newest `keep` stay; 0: all."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, number: int, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
        """Write checkpoint `number`, then let the oldest go.

        Raises:
            OSError: the disk is full, or broken; nothing that was there has changed.
        """
        from safetensors.torch import save_file

        final = self.folder / f"checkpoint-{number}"
        aside = self.folder / f".writing-{number}"
        remove(aside)  # of a server that was killed while it wrote
        with replacing(final, aside, sync=True):
            aside.mkdir(parents=True)
            with (aside / STATE).open("wb") as file:
                write_state(file, state, number)
            own = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(own, aside / MODEL, metadata={"format": "pt"})
            manifest = {name: _described(aside / name) for name in (STATE, MODEL)}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        self._rotate()
        return final

    def all(self) -> list[Path]:
        """The folders of all checkpoints, the oldest first."""
        found = {
            int(match.group(1)): path
            for path in self.folder.glob("checkpoint-*")
            if (match := _NAME.fullmatch(path.name))
        }
        return [found[number] for number in sorted(found)]

    def newest(self) -> tuple[int, Any] | None:
        """Number and state of the newest good one; None where there is no checkpoint.

        Raises:
            SettingsError: there are some, and none is good.
        """
        found = self.all()
        for path in reversed(found):
            try:
                return load(path)
            except SettingsError as error:
                logger.warning("%s; looking at the one before it", error)
        if found:
            raise SettingsError(
                f"none of the {len(found)} checkpoints in {self.folder} is complete: name another "
                "output folder, or a copy with --from-checkpoint"
            )
        return None

    def _rotate(self) -> None:
        if self.keep:
            for path in self.all()[: -self.keep]:
                shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> tuple[int, Any]:
    """Number and state of one checkpoint, read after its sizes and digests were compared.

    Raises:
        SettingsError: a file is missing, or is not what its manifest says.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        damaged = [n for n in (STATE, MODEL) if manifest[n] != _described(path / n)]
        if not damaged:
            return read_state(path / STATE)
    except (OSError, ValueError, KeyError, TypeError, LayoutError) as error:
        raise SettingsError(f"{path} is not complete: {type(error).__name__}: {error}") from None
    raise SettingsError(f"{path / damaged[0]} is not what its manifest says")


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
