"""What has happened since a checkpoint: one JSON line an event, and the uploads themselves.

    journal/00000003.jsonl     after checkpoint 3: ["join", …] ["take", …] ["close", …]

["gone", …] is a member that is one no more, ["optimizer", …] and ["expect", …] are orders. A line
is written before its event has any effect that a worker can see. A server that was killed loads its
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
from typing import Any

from torchft.parameter_server.core.rounds import RoundClosed
from torchft.parameter_server.core.submission import Share, Submission

__all__ = ["Journal", "closed_of", "line_of"]

logger = logging.getLogger(__name__)


def line_of(close: RoundClosed) -> dict[str, Any]:
    """A close as JSON."""
    shares = [
        [share.submission.state_dict(), share.weight, share.staleness] for share in close.shares
    ]
    return {"fragment": close.fragment, "version": close.version, "shares": shares}


def closed_of(line: dict[str, Any]) -> RoundClosed:
    """The inverse."""
    shares = tuple(Share(Submission(**s), weight, stale) for s, weight, stale in line["shares"])
    return RoundClosed(line["fragment"], line["version"], shares)


class Journal:
    """The files in `folder`, which is there; events go to the newest one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._at = 0
        self._newest = self._path(0), 0
        """The event that was read last: its file, and where in it."""

    def write(self, kind: str, event: dict[str, Any]) -> None:
        """Add one event. Raises OSError: it was not, and nothing of it is there."""
        line = (json.dumps([kind, event]) + "\n").encode()
        with self._path(self._at).open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
            except OSError:
                file.truncate(end)
                raise

    def begin(self, number: int) -> None:
        """From here on events are of the time after checkpoint `number`."""
        self._at = number

    def forget(self, number: int) -> None:
        """Checkpoint `number` is safe: what was before it is not needed."""
        for path in (p for p in self._files() if int(p.stem) < number):
            path.unlink(missing_ok=True)

    def has(self, number: int) -> bool:
        """What happened right after checkpoint `number` is here."""
        return self._path(number).exists()

    def clear(self) -> int:
        """Forget all events; the highest number that there was."""
        found = self._files()
        for path in found:
            path.unlink()
        return max((int(path.stem) for path in found), default=0)

    def after(self, number: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """All events since checkpoint `number`. A line that was cut is no event, and the last."""
        for path in (p for p in self._files() if int(p.stem) >= number):
            self._at = int(path.stem)
            end = 0
            for index, line in enumerate(path.read_bytes().splitlines(keepends=True)):
                self._newest = path, end
                end += len(line)
                try:
                    kind, event = json.loads(line)
                    if not line.endswith(b"\n"):
                        raise ValueError("it has no end")
                except ValueError:
                    logger.warning("%s: line %d is cut; what follows is lost", path, index + 1)
                    self.cut()
                    return
                yield kind, event

    def cut(self) -> None:
        """Forget the event that was read last and all that follow, so that new ones can."""
        path, at = self._newest
        os.truncate(path, at)
        for later in (p for p in self._files() if int(p.stem) > int(path.stem)):
            later.unlink()

    def _files(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.jsonl") if p.stem.isdigit())

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"
