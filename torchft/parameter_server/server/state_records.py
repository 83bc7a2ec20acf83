"""The newest state of each fragment on disk, so that a lost upload costs no round after it.

    spool/state/f0, f0.before      the newest record of fragment 0, and the one before it
    spool/state/f0.next            the one that is being written, over the one before

A record is one piece a chunk, each with its checksum: weights, what workers hold, the outer
optimizer's rows, and the `RoundClosed` that made them. A file is a record when all its pieces are
there and of the same close, so one that was written over in part is none. It is of use to a journal
that has the same close. Records are not forced to disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.checkpointing.layout import LayoutError
from torchft.checkpointing.state_file import read_state_from, write_state
from torchft.parameter_server.core.events import RoundClosed, event_from_json, event_to_json
from torchft.parameter_server.server.weights import ServerWeights
from torchft.parameter_server.server.work_queue import WorkQueue

__all__ = ["Replay", "StateRecorder", "StateRecords", "replay_of"]

_QUIET = 4.0
"""A record begins so many times later than the outer step took, in which workers fetch it."""


@dataclass(frozen=True)
class Replay:
    """How the journal's closes of one fragment are done again."""

    record: int = 0
    """The state is that of the record of this version; closes before it need no numbers. 0: each
    close is done from its uploads."""
    path: Path | None = None
    """Of that record."""
    stop: int | None = None
    """The first version whose numbers are lost for good: it and those after it are not done."""

    def __str__(self) -> str:
        """From where the fragment goes on."""
        if self.stop is not None:
            return f"version {self.stop - 1}, the newest one that is known"
        return f"the record of version {self.record}" if self.record else "all uploads"


def replay_of(lost: set[int], recorded: Mapping[int, Path]) -> Replay:
    """How the closes of one fragment are replayed: `lost` are the versions that have lost an
    upload, `recorded` the records of some. A record is used only where an upload before it is
    lost."""
    newest = max(recorded, default=0)
    if newest < min(lost, default=newest + 1):
        return Replay(stop=min(lost, default=None))
    left = (version for version in lost if version > newest)
    return Replay(newest, recorded[newest], min(left, default=None))


class StateRecords:
    """The records in `folder`, which one thread writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self, close: RoundClosed, pieces: Iterable[Mapping[str, Any]], give_way: Callable[[], bool]
    ) -> bool:
        """Record the state that `close` made, a piece a chunk.

        Returns False when `give_way` said before a piece that something else is to be done first;
        the records that there were still are.

        Raises:
            OSError: there is no room; the one that was begun is removed.
        """
        newest, before, next_ = self._files(close.fragment)
        if before.exists():
            before.replace(next_)  # its pages are written over: fresh ones take longer
        try:
            with next_.open("r+b" if next_.exists() else "w+b") as file:
                for piece in pieces:
                    if give_way():
                        return False
                    write_state(file, {"close": event_to_json(close), **piece}, close.version)
                file.truncate()
        except OSError:
            next_.unlink(missing_ok=True)
            raise
        if newest.exists():
            newest.replace(before)
        next_.replace(newest)
        return True

    def find(self, closes: Iterable[RoundClosed], chunks: int) -> dict[int, Path]:
        """The version and the file of each complete record of one of `closes`, which are of one
        fragment of so many chunks."""
        known = list(closes)
        found: dict[int, Path] = {}
        for path in self._files(known[0].fragment) if known else ():
            close = _close_in(path, chunks)
            if close in known:
                found[close.version] = path
        return found

    def read(self, path: Path) -> Iterator[dict[str, Any]]:
        """The pieces of a record that `find` found, one after the other."""
        return (piece for _, piece in _pieces(path))

    def clear(self) -> None:
        """Delete all records: they are of a history that the run does not go on from."""
        for path in self.folder.iterdir():
            path.unlink()

    def _files(self, fragment: int) -> tuple[Path, Path, Path]:
        newest = self.folder / f"f{fragment}"
        return newest, newest.with_suffix(".before"), newest.with_suffix(".next")


def _pieces(path: Path) -> Iterator[tuple[RoundClosed, dict[str, Any]]]:
    with path.open("rb") as file:
        while file.peek(1):
            _, piece = read_state_from(file, path.name)
            close = event_from_json(RoundClosed.kind, piece.pop("close"))
            assert isinstance(close, RoundClosed)
            yield close, piece


def _close_in(path: Path, chunks: int) -> RoundClosed | None:
    """What the record in a file is of; None: there is no complete one."""
    try:
        closes = [close for close, _ in _pieces(path)]
    except (OSError, LayoutError, ValueError, KeyError, TypeError):
        return None
    same = len(closes) == chunks and all(a == b for a, b in itertools.pairwise(closes))
    return closes[0] if closes and same else None


class StateRecorder:
    """Writes the records of one server, on its event loop."""

    def __init__(
        self, records: StateRecords, work_queue: WorkQueue, note: Callable[[str, int], None]
    ) -> None:
        self._records, self._work, self._note = records, work_queue, note
        self._ending = asyncio.Event()
        self._writing = asyncio.Lock()
        """One at a time: two that gave way to each other would do so for ever."""
        self._is_full = False
        """The last record could not be written, and that was said."""

    def end(self) -> None:
        """Write what is still to be recorded at once, without waiting for quiet."""
        self._ending.set()

    async def record(self, state: ServerWeights, close: RoundClosed, step_s: float) -> None:
        """Write a record of the state that `close` made, unless its next version is made first.

        Begins when four times as long as the step took (`step_s`) has passed, in which workers
        fetch the update, and gives way to all that is to be done in turn. A disk without room costs
        the record, and is said once until one is written again.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ending.wait(), _QUIET * step_s)
        try:
            async with self._writing:
                while state.published(close.fragment).version == close.version:
                    if await self._work.in_turn(self._write, state, close):
                        self._is_full = False
                        break
        except OSError as error:
            if not self._is_full and self._work.failure is None:
                what = f"the state of fragment {close.fragment}, version {close.version}"
                self._note(f"{what}, was not recorded, the run goes on: {error}", logging.WARNING)
            self._is_full = True

    def _write(self, state: ServerWeights, close: RoundClosed) -> bool:
        if state.published(close.fragment).version != close.version:
            return False  # a step was before it in the queue
        pieces = state.pieces(close.fragment)
        return self._records.write(close, pieces, self._work.others_wait)
