"""Where the logs and records of a run go."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torchft.errors import SettingsError

__all__ = ["run_folder"]


def run_folder(keep: Path | None, prefix: str) -> Path:
    """New or empty, so that no older run is read or gone on with: `keep`, or else a temporary one
    whose name begins with `prefix`.

    Raises:
        SettingsError: `keep` holds files.
    """
    if keep is None:
        return Path(tempfile.mkdtemp(prefix=prefix))
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise SettingsError(f"--keep {keep}: the folder holds files already; name another one")
    return keep.resolve()
