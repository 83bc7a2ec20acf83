"""What a checkpoint consists of: each file with its size and SHA-256, and the step of all of it.

A file that was cut, changed or lost is found by comparing; what was added to the folder is ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torchft.errors import CheckpointError

__all__ = ["MANIFEST", "DamagedError", "File", "Manifest", "hash_of", "read_manifest"]

MANIFEST = "manifest.json"
VERSION = 1


class DamagedError(CheckpointError):
    """A checkpoint is not what its manifest says; names the file."""


@dataclass(frozen=True)
class File:
    """Size and SHA-256 of what one file holds."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint consists of, and who wrote it."""

    step: int
    ranks: int
    """Of the replica group that wrote it."""
    written_by: str
    """Its full replica id."""
    files: Mapping[str, File]

    def to_text(self) -> str:
        """As JSON, to be read by people too."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def of_text(cls, text: str) -> Manifest:
        """The inverse.

        Raises:
            DamagedError: it is no manifest, or one of a later version.
        """
        try:
            fields = json.loads(text)
            version = fields.pop("version")
            files = {name: File(**one) for name, one in fields.pop("files").items()}
            made = cls(**fields, files=files)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedError(f"{MANIFEST} is damaged: {error}") from None
        if version != VERSION:
            raise DamagedError(f"{MANIFEST} has version {version}, and only {VERSION} is known")
        return made

    def check_sizes(self, folder: Path) -> None:
        """Compare the sizes of all files, which takes no time.

        Raises:
            DamagedError: a file is missing, or has another size.
        """
        for name, file in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise DamagedError(f"{name}: {error.strerror or error}") from None
            if size != file.bytes:
                raise DamagedError(f"{name} has {size} bytes instead of {file.bytes}")

    def check_hashes(self, folder: Path, names: Iterable[str]) -> None:
        """Read the named files and compare their hashes.

        Raises:
            DamagedError: a file differs, or cannot be read.
        """
        for name in names:
            try:
                found = hash_of(folder / name)
            except OSError as error:
                raise DamagedError(f"{name}: {error.strerror or error}") from None
            if found != self.files[name]:
                raise DamagedError(f"{name} has another SHA-256 than when it was written")


def hash_of(path: Path) -> File:
    """Size and hash of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(file.tell(), digest)


def read_manifest(folder: Path, step: int) -> Manifest:
    """The manifest of the checkpoint of `step`, whose files are there with their sizes.

    Raises:
        DamagedError: it is not whole; says why.
    """
    try:
        manifest = Manifest.of_text((folder / MANIFEST).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{MANIFEST}: {error}") from None
    if manifest.step != step:
        raise DamagedError(f"{MANIFEST} is of step {manifest.step}")
    manifest.check_sizes(folder)
    return manifest
