"""Several jobs at a time, each in a process of its own: one that dies takes no other with it.

The processes are forked from a server that has imported torch and runs no thread, so that each
starts within milliseconds; where there is no such server, they are spawned.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

from torchft.errors import TorchftError

__all__ = ["Ended", "run_jobs"]

Job = TypeVar("Job")


@dataclass(frozen=True)
class Ended(Generic[Job]):
    """A job that is over, with what it left."""

    job: Job
    error: str | None
    """Why it failed."""


def run_jobs(
    work: Callable[[Job], None], jobs: Sequence[Job], at_once: int, *, warm: Sequence[str] = ()
) -> Iterator[Ended[Job]]:
    """Do `work(job)` for each, at most `at_once` of them at a time; each as it ends.

    `work` and the jobs are pickled. `warm` are modules to import once, for all; one that is missing
    is passed over. Jobs that still run when the iteration is left are ended.
    """
    context = _context(warm)
    waiting, running = list(reversed(jobs)), dict[Any, _Running[Job]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                one = _Running(context, work, waiting.pop())
                running[one.process.sentinel] = one
            for sentinel in connection.wait(list(running)):
                yield running.pop(sentinel).ended()
    finally:
        for one in running.values():
            one.process.kill()
            one.process.join()


class _Running(Generic[Job]):
    """One process."""

    def __init__(self, context: Any, work: Callable[[Job], None], job: Job) -> None:
        self.job = job
        self._words, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_do, args=(work, job, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ended(self) -> Ended[Job]:
        """What came of it."""
        self.process.join()
        error = self._error()
        self._words.close()
        return Ended(self.job, error)

    def _error(self) -> str | None:
        # A pipe takes the few words at once, so whoever had some has left them there.
        if self._words.poll():
            try:
                return str(self._words.recv())
            except EOFError:
                pass
        code = self.process.exitcode or 0
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process ended with code {code}" if code else None


_LONGEST = 2000
"""Characters of an error that are passed on: less than a pipe holds."""


def _do(work: Callable[[Job], None], job: Job, words: connection.Connection) -> None:
    # Whoever started the jobs ends them: Ctrl-C reaches all processes of a terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(job)
    except Exception as error:
        words.send(said(error)[-_LONGEST:])


def said(error: Exception) -> str:
    """An error of ours as it is; of anyone else's the way to it too."""
    if isinstance(error, TorchftError):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def _context(warm: Sequence[str]) -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(warm))
    return context
