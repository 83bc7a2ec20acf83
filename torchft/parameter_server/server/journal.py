"""What has happened since a checkpoint: one JSON line an event, and the uploads themselves.

    journal/00000003.jsonl     after checkpoint 3: ["join", …] ["take", …] ["close", …]

A line has an event's kind and its fields (`core/events.py`). It is written before its event has any
effect that a worker can see. A server that was killed loads its
newest checkpoint and does again what the lines say, from the same uploads and with the same bits.
Lines and uploads are handed to the system but not forced to disk: they survive the process, while
checkpoints survive the machine. Where an upload is lost, its fragment goes on from a state record
of a later version (`state_records`), or ends with the version before.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from torchft.parameter_server.core.events import Event, event_from_json, event_to_json

__all__ = ["Journal"]

logger = logging.getLogger(__name__)


class Journal:
    """The files in `folder`, which is there; events go to the newest one, or, where it `keeps`
    none, nowhere."""

    def __init__(self, folder: Path, *, keeps: bool = True) -> None:
        self.folder, self._keeps = folder, keeps
        self._at = 0

    def write(self, event: Event) -> None:
        """Add one event to the newest file, before it has an effect.

        Raises:
            OSError: there is no room, and nothing of it is there.
        """
        if not self._keeps:
            return
        line = (json.dumps([event.kind, event_to_json(event)]) + "\n").encode()
        with self._path(self._at).open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
            except OSError:
                file.truncate(end)
                raise

    def begin(self, number: int) -> None:
        """Write events from here on to the file of what comes after checkpoint `number`."""
        self._at = number

    def forget(self, number: int) -> None:
        """Delete the files of what came before checkpoint `number`, which is safe."""
        for path in self._files():
            if int(path.stem) < number:
                path.unlink(missing_ok=True)

    def has(self, number: int) -> bool:
        """Whether there is a file of what happened right after checkpoint `number`."""
        return self._path(number).exists()

    def clear(self) -> int:
        """Delete all files; returns the highest checkpoint number that one was of, or 0."""
        found = self._files()
        for path in found:
            path.unlink()
        return max((int(path.stem) for path in found), default=0)

    def after(self, number: int) -> Iterator[Event]:
        """All events since checkpoint `number`. They end at a line that was cut short; it and
        all that follows are deleted."""
        for path in self._files(number):
            self._at, end = int(path.stem), 0
            for index, line in enumerate(path.read_bytes().splitlines(keepends=True)):
                try:
                    kind, fields = json.loads(line if line.endswith(b"\n") else b"")
                except ValueError:
                    logger.warning("%s: line %d is cut; what follows is lost", path, index + 1)
                    os.truncate(path, end)
                    for later in self._files(self._at + 1):
                        later.unlink()
                    return
                end += len(line)
                yield event_from_json(kind, fields)

    def _files(self, least: int = 0) -> list[Path]:
        """The files of what came after checkpoint `least` and later ones, in their order."""
        found = (p for p in self.folder.glob("*.jsonl") if p.stem.isdigit())
        return sorted(path for path in found if int(path.stem) >= least)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"
