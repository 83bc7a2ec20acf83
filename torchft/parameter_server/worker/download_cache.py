"""Files of updates as they arrive: each chunk is checked, and a transfer that broke goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torchft.errors import UnreachableError
from torchft.parameter_server.core.chunks import ChunkError, Chunks
from torchft.parameter_server.core.weight_update import UpdateKind
from torchft.parameter_server.file_pool import FilePool

__all__ = ["DownloadCache", "DownloadedUpdate"]

_FREE_FILES = 4

Fill = Callable[[memoryview], None]


@dataclass(frozen=True)
class DownloadedUpdate:
    """A complete update of one fragment, in files that were downloaded."""

    version: int
    identity: str
    files: tuple[tuple[UpdateKind, Path], ...]
    cache: DownloadCache

    @property
    def nbytes(self) -> int:
        """How many bytes its files have."""
        return sum(path.stat().st_size for _, path in self.files)

    def drop(self) -> None:
        """Give its files back to the cache, once they have been read."""
        for _, path in self.files:
            self.cache.drop(path)


class DownloadCache:
    """The files that one worker downloads, in a folder of its own until `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="diloco-")
        self._pool = FilePool(Path(self._folder.name), _FREE_FILES)
        self._have: dict[str, int] = {}
        """File → how many of its chunks are here and good."""

    def fetch(
        self, name: str, chunks: Chunks, reading: Callable[[int], AbstractContextManager[Fill]]
    ) -> Path:
        """Download the file `name` and return its path; `reading` opens its last so many bytes.

        Raises:
            UnreachableError: if not all came, or some was damaged; what is good stays.
        """
        path = Path(self._folder.name) / Path(name).name
        if name not in self._have:
            chunks.prepare(self._pool.create(path))
            self._have[name] = 0
        have = self._have[name]
        if have < chunks.count:
            with reading(chunks.nbytes - chunks.offset(have)) as fill:
                self._receive(name, path, chunks, fill)
        return path

    def _receive(self, name: str, path: Path, chunks: Chunks, fill: Fill) -> None:
        memory = chunks.memory()
        for index in range(self._have[name], chunks.count):
            piece = memory[: chunks.nbytes_of(index)]
            fill(piece)
            try:
                chunks.check(index, piece)
            except ChunkError as error:
                raise UnreachableError(f"{name} was damaged on its way: {error}") from None
            chunks.write_one(path, index, piece)
            self._have[name] = index + 1

    def drop(self, path: Path) -> None:
        """Give a file back that has been read, for the next one."""
        self._have.pop(path.name, None)
        self._pool.retire(path)

    def close(self) -> None:
        """Delete all files and the folder."""
        self._folder.cleanup()
