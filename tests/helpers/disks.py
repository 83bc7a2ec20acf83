"""Disks that fill, break, or lose their process at a file operation that a test names.

    with_disk(Disk(killed_at=7), lambda: save(…))     # True: it came to its end

All that changes files is counted, by Python's audit events and `os.fsync`, in a process forked for
it: such a hook cannot be taken away again.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Disk", "with_disk"]

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Disk:
    """Counts changes of files from 1 on; `…_at`: what happens just before that one."""

    killed_at: int | None = None
    """SIGKILL."""
    broken_at: int | None = None
    """This one fails."""
    full_at: int | None = None
    """From it on nothing can be written any more; files can still be renamed and deleted."""
    changes: int = 0

    def attach(self) -> None:
        """For the rest of this process."""
        sync = os.fsync

        def fsync(file: Any) -> None:
            self._change(writes=True)
            sync(file)

        os.fsync = fsync
        sys.addaudithook(self._event)

    def _event(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[2], int) and given[2] & _WRITES:
            self._change(writes=True)
        elif event in _CHANGES:
            self._change(writes=event == "os.mkdir")

    def _change(self, *, writes: bool) -> None:
        self.changes += 1
        if self.changes == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.changes == self.broken_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.full_at is not None and self.changes >= self.full_at and writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def with_disk(disk: Disk, story: Callable[[], object]) -> bool:
    """Run `story` on that disk; whether it ended, or was killed. What it raises fails the test."""
    child = multiprocessing.get_context("fork").Process(target=_live, args=(disk, story))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "it raised: see the traceback above"
    return child.exitcode == 0


def _live(disk: Disk, story: Callable[[], object]) -> None:
    try:
        disk.attach()
        story()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
