"""What a server keeps on disk: uploads, the journal, checkpoints, and when a checkpoint is due.

    <output>/checkpoints/  journal/  spool/uploads/  spool/news/  spool/state/

An upload stays until a checkpoint has what it was used for. With `save_every` 0 nothing is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchft.errors import TorchftError
from torchft.parameter_server.core.events import RoundClosed
from torchft.parameter_server.core.options import ServerOptions
from torchft.parameter_server.file_pool import FilePool
from torchft.parameter_server.server.checkpoints import Checkpoints, load
from torchft.parameter_server.server.journal import Journal
from torchft.parameter_server.server.state_records import StateRecords

__all__ = ["Storage", "StorageError"]

logger = logging.getLogger(__name__)

_JOURNAL_SIZES = 8
"""A checkpoint is due early when the kept uploads take so many times its size."""
_FREE_UPLOADS = 32
_CHECKPOINT_BYTES = 16
"""Of a checkpoint, a parameter, about."""


class StorageError(TorchftError):
    """The server ends, because its disk is full or broken."""


class Storage:
    """The files of one output folder, and the rules of what is kept how long."""

    def __init__(self, options: ServerOptions) -> None:
        folder = options.output_dir
        self.uploads, self.updates = folder / "spool" / "uploads", folder / "spool" / "news"
        self.journal = Journal(folder / "journal", keeps=options.save_every > 0)
        self.records = StateRecords(folder / "spool" / "state")
        self.number = 0
        """Of the newest checkpoint, or of the one that is being written."""
        self._options = options
        self.checkpoints = Checkpoints(folder / "checkpoints", options.save_total_limit)
        self._spent: list[Path] = []
        self._pool = FilePool(self.uploads, _FREE_UPLOADS)
        self._rounds = 0

    @property
    def has_unsaved(self) -> bool:
        """Whether a round has closed since the last checkpoint."""
        return self._rounds > 0

    def open(self) -> tuple[int, Any, bool] | None:
        """Number and state of the checkpoint to go on from, and whether its journal follows it;
        None for a new run.

        Raises:
            SettingsError: there is no good one.
        """
        for folder in (self.uploads, self.updates, self.journal.folder, self.records.folder):
            folder.mkdir(parents=True, exist_ok=True)
        for old in self.updates.iterdir():
            old.unlink()
        chosen = self._options.from_checkpoint
        saved = self.checkpoints.newest() if chosen is None else load(chosen)
        if saved is None:
            self.records.clear()
            return None
        known = (int(path.name.split("-")[1]) for path in self.checkpoints.all())
        self.number = max([saved[0], *known])
        follows = chosen is None and self._journal_follows(saved[0])
        if follows:
            self.journal.begin(saved[0])
        else:
            self.number = max(self.number, self.journal.clear()) + 1
            self.journal.begin(self.number)
            self.records.clear()
        return (*saved, follows)

    def _journal_follows(self, number: int) -> bool:
        """With the checkpoint after it, a journal loses what was between the two."""
        if number == self.number or self.journal.has(number):
            return True
        logger.warning(
            "the rounds between checkpoint %d and checkpoint %d, which is damaged, are lost, and "
            "so are those after it",
            *(number, self.number),
        )
        return False

    def ended(self, what: str, why: Exception) -> StorageError:
        """The error of a server that could not do `what` and cannot go on without it."""
        kept = (
            "checkpoints and journal have all that is needed to go on"
            if self._options.save_every
            else "nothing was kept (--save-every 0), and workers hand their weights in again"
        )
        reason = why.strerror if isinstance(why, OSError) else why
        return StorageError(
            f"{what}: {reason}. Look after the disk of {self._options.output_dir}, free some room "
            f"if it is full, and start the server again: {kept}"
        )

    def upload(self, name: str) -> Path:
        """The path of the upload of that name."""
        return self.uploads / f"{name}.row"

    def create_upload(self, name: str) -> Path:
        """A file for the upload of that name; it may hold old numbers, to be written over."""
        return self._pool.create(self.upload(name))

    def spend(self, close: RoundClosed) -> None:
        """Note that the step of a round was taken: a later checkpoint makes its uploads useless."""
        done = [self.upload(share.submission.upload) for share in close.shares]
        self._rounds += 1
        if self._options.save_every:
            self._spent += done
        else:
            self._retire(done)

    def is_due(self, fragments: int, numel: int) -> bool:
        """Whether so many rounds have closed, or so many bytes of uploads are kept, that a
        checkpoint should be written."""
        if not self._options.save_every:
            return False
        kept = sum(path.stat().st_size for path in self._spent if path.exists())
        many = self._rounds >= self._options.save_every * fragments
        return many or kept > _JOURNAL_SIZES * _CHECKPOINT_BYTES * numel

    @contextmanager
    def checkpoint(self) -> Iterator[int]:
        """Number the next checkpoint, which the block writes: what happens from here on is not in
        it. Where the block raises, the older one and both journals still hold."""
        self.number += 1
        number, spent, self._spent, self._rounds = self.number, self._spent, [], 0
        self.journal.begin(number)
        try:
            yield number
        except OSError:
            self._spent = spent + self._spent
            raise
        self.journal.forget(number)
        self._retire(spent)

    def delete_all_but(self, pending: Iterable[str]) -> None:
        """Delete the uploads that no event needs; `pending` names those of open rounds."""
        needed = {*self._spent, *map(self.upload, pending)}
        for path in self.uploads.iterdir():
            if path not in needed and not self._pool.is_free(path):
                path.unlink(missing_ok=True)

    def _retire(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._pool.retire(path)
