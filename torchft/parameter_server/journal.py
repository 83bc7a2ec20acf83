"""What has happened since a checkpoint: one JSON line an event, and the uploads themselves.

    journal/00000003.jsonl     after checkpoint 3: ["join", …] ["take", …] ["close", …]

and ["optimizer", …] where an order changed its settings. A line is written before its event has any
effect that a worker can see. A server that was killed loads its newest checkpoint and does again
what the lines say, from the same uploads and with the same bits. Lines and uploads are handed to
the system but not forced to disk: they survive the process, while checkpoints survive the machine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchft.parameter_server.rounds import Close
from torchft.parameter_server.submission import Share, Submission

__all__ = ["Journal", "close_of", "line_of"]

logger = logging.getLogger(__name__)


def line_of(close: Close) -> dict[str, Any]:
    """A close as JSON."""
    shares = [
        [share.submission.state_dict(), share.weight, share.staleness] for share in close.shares
    ]
    return {"fragment": close.fragment, "version": close.version, "shares": shares}


def close_of(line: dict[str, Any]) -> Close:
    """The inverse."""
    shares = tuple(Share(Submission(**s), weight, stale) for s, weight, stale in line["shares"])
    return Close(line["fragment"], line["version"], shares)


class Journal:
    """The files in `folder`; events go to the newest one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._at = 0

    def write(self, kind: str, event: dict[str, Any]) -> None:
        """Add one event."""
        with self._path(self._at).open("a") as file:
            file.write(json.dumps([kind, event]) + "\n")

    def begin(self, number: int) -> None:
        """From here on events are of the time after checkpoint `number`."""
        self._at = number

    def forget(self, number: int) -> None:
        """Checkpoint `number` is safe: what was before it is not needed."""
        for path in self.folder.glob("*.jsonl"):
            if path.stem.isdigit() and int(path.stem) < number:
                path.unlink(missing_ok=True)

    def after(self, number: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """All events since checkpoint `number`. A last line that was cut is no event."""
        found = sorted(p for p in self.folder.glob("*.jsonl") if p.stem.isdigit())
        for path in (p for p in found if int(p.stem) >= number):
            self._at = max(self._at, int(path.stem))
            lines = path.read_text().splitlines()
            for index, line in enumerate(lines):
                try:
                    kind, event = json.loads(line)
                except ValueError:
                    logger.warning("%s: line %d is cut; what follows is lost", path, index + 1)
                    return
                yield kind, event

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"
