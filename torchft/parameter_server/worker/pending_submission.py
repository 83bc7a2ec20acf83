"""A submission on its way, from the step that made it to the news that answer it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from torchft.parameter_server.core.weight_update import UpdateKind
from torchft.parameter_server.worker.download_cache import DownloadCache

__all__ = ["DownloadedUpdate", "PendingSubmission"]


@dataclass(frozen=True)
class DownloadedUpdate:
    """An update of the weights that has been downloaded completely."""

    version: int
    identity: str
    files: tuple[tuple[UpdateKind, Path], ...]
    cache: DownloadCache

    def drop(self) -> None:
        """Delete the files of the update, which have been read."""
        for _, path in self.files:
            self.cache.drop(path)


@dataclass
class PendingSubmission:
    """One fragment's submission. Its fields change in the link's thread until `over` is set."""

    fragment: int
    base: int
    identity: str
    number: int
    steps: int
    tokens: int
    chunks: list[memoryview]
    """The encoded delta; kept until the news are adopted, whatever happens to the connection."""
    is_sent: bool = False
    refused: str | None = None
    """The server does not want it, and why."""
    update: DownloadedUpdate | None = None
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def nbytes(self) -> int:
        """How many bytes the submission takes on the wire."""
        return sum(map(len, self.chunks))
