"""Whether a folder can be written to, found out before there is something to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torchft.errors import SettingsError

__all__ = ["check_folder"]


def check_folder(setting: str, folder: Any) -> None:
    """Refuse a folder that cannot be made or written to. Leaves nothing behind.

    Raises:
        SettingsError: names the setting, and what is in the way.
    """
    if not isinstance(folder, str | os.PathLike):
        raise SettingsError(f"{setting}={folder!r}: it must be a path")
    there = _nearest(Path(folder))
    if not there.is_dir():
        raise SettingsError(
            f"{setting}: {folder} cannot be a folder, because {there} is none: give another path"
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise SettingsError(
            f"{setting}: {folder} cannot be written ({error.strerror} in {there}): give a folder "
            "that can"
        ) from error


def _nearest(path: Path) -> Path:
    """The longest part of it that is there."""
    path = Path(os.path.abspath(path))
    return next(part for part in (path, *path.parents) if os.path.lexists(part))
