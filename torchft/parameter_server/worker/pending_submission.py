"""A submission from the step that made it to the update that answers it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from torchft.parameter_server.core.weight_update import UpdateKind
from torchft.parameter_server.worker.download_cache import DownloadCache

__all__ = ["DownloadedUpdate", "PendingSubmission"]


@dataclass(frozen=True)
class DownloadedUpdate:
    """A complete update of one fragment, in files that were downloaded."""

    version: int
    identity: str
    files: tuple[tuple[UpdateKind, Path], ...]
    cache: DownloadCache

    def drop(self) -> None:
        """Give its files back to the cache, once they have been read."""
        for _, path in self.files:
            self.cache.drop(path)


@dataclass
class PendingSubmission:
    """One fragment's submission. The connection's thread changes its fields until `over` is set."""

    fragment: int
    base: int
    identity: str
    number: int
    steps: int
    tokens: int
    chunks: list[memoryview]
    """The encoded delta; kept until the update is applied, whatever happens to the connection."""
    is_sent: bool = False
    refused: str | None = None
    """Why the server refused it; None where it did not."""
    update: DownloadedUpdate | None = None
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def nbytes(self) -> int:
        """How many bytes it has on the wire."""
        return sum(map(len, self.chunks))
