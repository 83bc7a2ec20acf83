"""One line of JSON for each step that a manager closes, committed or not.

Training appends, whoever watches reads: the launcher, a plot, a person with `tail -f`. A record
is one write to a file opened for appending, so several processes may share a file. A process that
is killed can leave at most one torn line, its last. The next writer starts on a new line, and
readers pass over torn lines and count them.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchft.errors import TorchftError

__all__ = [
    "LineFollower",
    "LineWriter",
    "RecordsError",
    "StepRecord",
    "StepRecords",
    "StepRecordsReader",
    "read_step_records",
]


class RecordsError(TorchftError):
    """A line is whole JSON but no step record; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one process knows of one step when it has been closed."""

    t_monotonic: float
    """`time.monotonic()` in seconds at the close: comparable between processes of one host."""
    replica_id: str
    """The group's name with the suffix of this start."""
    group_rank: int
    """The rank inside the group."""
    step: int
    """The step that was voted on: the manager's step before a commit raised it."""
    quorum_id: int
    members: tuple[str, ...]
    """Replica ids of the quorum, in the order of their replica ranks."""
    participants: int
    """How many of the members contributed to the average."""
    committed: bool
    why: str | None = None
    """Why it was not committed."""
    bytes_sent: int = 0
    """Payload bytes that this process handed to the wire in this step: collectives and heals."""
    bytes_received: int = 0
    """Payload bytes that this process read from the wire in this step."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of this step by bucket (`torchft.ledger.Bucket`)."""
    ledger: Mapping[str, float] = field(default_factory=dict)
    """Seconds by bucket since the process was created."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the training script adds, such as its loss. Values that JSON can hold."""

    def to_json(self) -> str:
        """One line without its end. Raises TypeError when `extra` holds what JSON cannot."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> StepRecord:
        """Raises `json.JSONDecodeError` on a torn line, TypeError on other JSON."""
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise TypeError(f"expected an object, got {type(fields).__name__}")
        return cls(**{**fields, "members": tuple(fields.get("members", ()))})


class LineWriter:
    """Appends whole lines to the file at `path`, which is made with its folders when absent.

    A line is one write, so that several processes may share a file. What a full disk or a kill has
    cut stays a line of its own.

    Raises OSError from the constructor and from `write` when the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._torn = self._ends_torn()

    def write(self, line: bytes) -> None:
        """Write `line`, which is given without its end.

        Raises:
            OSError: the file cannot be written, or the disk is full.
        """
        line = (b"\n" if self._torn else b"") + line + b"\n"
        written = self._file.write(line)
        if written != len(line):
            self._torn = self._torn or written > 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._torn = False

    def close(self) -> None:
        """Close the file. Closing twice is fine."""
        self._file.close()

    def _ends_torn(self) -> bool:
        if self._file.seek(0, os.SEEK_END) == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"


class StepRecords:
    """Appends records to the file at `path`; raises OSError as `LineWriter` does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._lines = LineWriter(path)

    def append(self, record: StepRecord) -> None:
        """Write `record` at once, in a single write, so that a reader or a kill cannot split it."""
        self._lines.write(record.to_json().encode())

    def close(self) -> None:
        """Close the file. Closing twice is fine."""
        self._lines.close()

    def __enter__(self) -> StepRecords:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class LineFollower:
    """Follows a file that others append to. The file need not exist yet."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._offset = 0

    def poll(self) -> list[bytes]:
        """The lines added since the last call. A last line without its end waits for it."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


class StepRecordsReader:
    """Follows a file that others append to. The file need not exist yet."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.torn = 0
        """How many torn lines were passed over: each is the last word of a killed process."""
        self._lines = LineFollower(path)
        self._line = 0

    def poll(self) -> list[StepRecord]:
        """The records added since the last call. A last line without its end waits for it.

        Raises:
            RecordsError: a line is JSON but no step record.
        """
        return list(self._parse(self._lines.poll()))

    def _parse(self, lines: list[bytes]) -> Iterator[StepRecord]:
        for line in lines:
            self._line += 1
            try:
                yield StepRecord.from_json(line)
            except ValueError:
                # Not JSON, or not even UTF-8: somebody was killed in the middle of this line.
                self.torn += 1
            except TypeError as error:
                raise RecordsError(f"{self.path}:{self._line} is no step record: {error}") from None


def read_step_records(path: str | os.PathLike[str]) -> list[StepRecord]:
    """All whole records of a file, in the order they were written.

    Raises:
        FileNotFoundError: there is no such file.
        RecordsError: a line is JSON but no step record.
    """
    os.stat(path)
    return StepRecordsReader(path).poll()
