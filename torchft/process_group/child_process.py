"""The parent's side of one child process: its start, its requests, its end.

One thread reads what the child says. It is the one that notices a child that is gone (the pipe
ends) or hangs (a request is not answered by its deadline), kills it, and ends everything that waits
for it with a `ChildLostError`. So nobody else needs to know whether the child still lives.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

from torch.distributed import Work
from torch.futures import Future

from torchft.errors import ChildLostError, CollectiveError, SettingsError
from torchft.process_group.adapters import Members
from torchft.process_group.child import Configure, NewSegment, Operation, Reply, SetTimeout
from torchft.process_group.shared_memory import Segments

__all__ = ["ChildProcess", "ChildSettings", "ChildWork"]

_LOOK_S = 0.5
"""How often requests that are not answered are looked at."""
_START_S = 120.0
"""So long a child may take to import torch on a busy machine."""
_GRACE_S = 3.0
"""So long beyond the timeout may the child itself say what was missing."""
_END_S = 1.0
"""So long a child may take to end by itself."""

# It ignores Ctrl-C from its first instruction on: torch's import takes seconds.
_PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = {path!r}
from torchft.process_group.child import main
main({descriptor}, {parent}, {factory!r}, {device!r}, {timeout_s!r}, {most})
"""


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What a child is started with."""

    factory: str
    """`module:name` of what makes its process group from a timeout."""
    device: str
    """On which that group wants its tensors."""
    timeout: timedelta
    """Deadline of each configure and operation."""
    most: int
    """How many operations may be under way at once."""


class ChildWork(Work):
    """A request under way. `keep` is called with the reply of one that succeeded: it fetches the
    result; `done` when the child has no more to do with it."""

    def __init__(
        self,
        result: Any = None,
        *,
        keep: Callable[[Reply], None] = lambda _: None,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.deadline = float("inf")
        """By when the child must have answered, in seconds of `time.monotonic()`."""
        self.done = done
        self._result = result
        self._keep = keep
        self._ended = threading.Event()
        self._ending = threading.RLock()
        self._error: Exception | None = None
        self._future: Future[Any] | None = None

    def succeed(self, reply: Reply) -> None:
        """End it with what the child brings, unless it has ended: then the tensors stay."""
        with self._ending:
            if not self._ended.is_set():
                self._keep(reply)
                self._ended.set()
        self._answer()

    def fail(self, error: Exception) -> None:
        """End it with `error`, unless it has ended."""
        with self._ending:
            if not self._ended.is_set():
                self._error = error
                self._ended.set()
        self._answer()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for the result. Without `timeout`, until the group's deadline.

        Raises:
            CollectiveError: it failed, was abandoned, or is not there after `timeout`.
            ChildLostError: the child process died, or was killed because it hung.
        """
        if not self._ended.wait(timeout.total_seconds() if timeout else None):
            assert timeout is not None
            raise CollectiveError(f"timed out: no result in {timeout.total_seconds():g} s")
        if self._error is not None:
            raise self._error
        return True

    def get_future(self) -> Future[Any]:
        """Completes by itself, with the tensors that have the result."""
        with self._ending:
            future = self._future = self._future or Future()
        if self._ended.is_set():
            self._answer()
        return future

    def is_completed(self) -> bool:
        """Whether it has ended, with a result or without."""
        return self._ended.is_set()

    def is_success(self) -> bool:
        """Whether it has ended with a result."""
        return self._ended.is_set() and self._error is None

    def result(self) -> Any:
        """The tensors that have the result, or get it."""
        return self._result

    def synchronize(self) -> None:
        """Wait until the group's deadline, as `wait` does."""
        self.wait()

    def block_current_stream(self) -> None:
        """Wait as `wait` does: the current stream then sees the result."""
        self.wait()

    def _answer(self) -> None:
        with self._ending:
            if self._future is None or self._future.done():
                return
            if self._error is not None:
                self._future.set_exception(self._error)
            else:
                self._future.set_result(self._result)


class ChildProcess:
    """A child, started at once; it can be asked before it stands.

    `lost(child, error)` is called on its thread when it is gone without having been closed.
    """

    def __init__(
        self, settings: ChildSettings, lost: Callable[[ChildProcess, ChildLostError], None]
    ) -> None:
        self.stands = threading.Event()
        """It has imported torch, and answers."""
        self.segments = Segments(self._share)
        self._timeout = settings.timeout
        self._lost = lost
        self._pid = os.getpid()
        self._waiting: dict[int, ChildWork] = {}
        self._requests = 0
        self._asking = threading.RLock()
        """Held while something is sent, so that requests keep their order."""
        self._error: ChildLostError | None = None
        self._closed = False
        self._started = time.monotonic()
        self._line, theirs = Pipe()
        try:
            self.process = _started(settings, theirs.fileno())
        except BaseException:
            self._line.close()
            raise
        finally:
            theirs.close()
        self._reader = threading.Thread(target=self._read, name="torchft-child", daemon=True)
        self._reader.start()

    @property
    def lost(self) -> bool:
        """Whether it can answer no more."""
        return self._error is not None

    def configure(self, work: ChildWork, members: Members) -> None:
        """Ask for another configuration; ends `work`."""
        self._request(work, lambda number: Configure(number, members))

    def start(self, work: ChildWork, name: str, segment: int, *parts: list[Any]) -> None:
        """Ask for an operation; ends `work`. `parts`: arguments, reads, writes."""
        self._request(work, lambda number: Operation(number, name, segment, *parts))

    def set_timeout(self, timeout: timedelta) -> None:
        """Of what is asked from now on."""
        self._timeout = timeout
        self.tell(SetTimeout(timeout))

    def tell(self, request: Any) -> None:
        """What has no reply. A child that is gone is not told."""
        with suppress(ChildLostError):
            self._ask(request)

    def abandon(self, error: Exception) -> None:
        """End all that is under way with `error`; what the child still brings is dropped."""
        for work in list(self._waiting.values()):
            work.fail(error)

    def kill(self) -> None:
        """End it now; its thread does the rest."""
        if self._pid == os.getpid():
            self.process.kill()

    def close(self) -> None:
        """End it and free everything; returns when it is gone."""
        if self._pid != os.getpid():
            return  # a fork's copy: the child is the parent's
        self._closed = True
        with suppress(OSError), self._asking:
            # Its end of the pipe closes when the child, which this wakes, is gone.
            _shut(self._line)
        if threading.current_thread() is not self._reader:
            self._reader.join(2 * _END_S + _LOOK_S)

    def _request(self, work: ChildWork, request: Callable[[int], Any]) -> None:
        with self._asking:
            self._requests += 1
            work.deadline = time.monotonic() + self._timeout.total_seconds() + _GRACE_S
            self._waiting[self._requests] = work
            try:
                self._ask(request(self._requests))
            except BaseException:
                # Who asked is told by this error, so that nobody else may end the work too.
                self._waiting.pop(self._requests)
                raise

    def _ask(self, request: Any) -> None:
        with self._asking:
            if self._pid != os.getpid():
                raise ChildLostError(
                    f"the child process belongs to process {self._pid}, which forked this one: "
                    "make the process group after the fork"
                )
            if self._error is not None:
                raise ChildLostError(str(self._error))
            try:
                self._line.send(request)
            except OSError as error:
                # Its thread will see the same and say what the child died of.
                raise ChildLostError(f"the child process is gone: {error}") from error

    def _share(self, number: int, nbytes: int, descriptor: int) -> None:
        with self._asking:
            self._ask(NewSegment(number, nbytes))
            send_handle(self._line, descriptor, self.process.pid)

    def _read(self) -> None:
        why = "died"
        try:
            while not (late := self._late()):
                if self._line.poll(_LOOK_S):
                    self._take(self._line.recv())
            why = late
        except _CannotStart as error:
            why = str(error)
        except (EOFError, OSError):
            pass
        finally:
            self._end(why)

    def _take(self, reply: Reply) -> None:
        if reply.number == 0:
            if reply.failure is not None:
                raise _CannotStart(f"could not start: {reply.failure.kind}: {reply.failure.text}")
            self.stands.set()
            return
        work = self._waiting.pop(reply.number)
        if reply.failure is None:
            work.succeed(reply)
        else:
            work.fail(reply.failure.restored())
        work.done()

    def _late(self) -> str:
        """What is said of a child that hangs; empty while it does not."""
        now = time.monotonic()
        if not self.stands.is_set():
            stuck = now > self._started + _START_S
            return f"did not start within {_START_S:g} s and was killed" if stuck else ""
        if any(work.deadline < now for work in list(self._waiting.values())):
            return f"hung: no answer in {self._timeout.total_seconds():g} s, and was killed"
        return ""

    def _patience_s(self) -> float:
        # One that has not begun to listen does not hear that it should end.
        return _END_S if self._closed and self.stands.is_set() else 0.0

    def _end(self, why: str) -> None:
        status = _ended(self.process, patience_s=self._patience_s())
        if self._closed:
            error = ChildLostError("the handle is closed: the process group was shut down")
        else:
            error = ChildLostError(
                f"the child process {self.process.pid} {why} (exit status {status}): the next "
                "configure uses a new one"
            )
        with self._asking:
            self._error = error
            self._line.close()
        self.abandon(error)
        for number in list(self._waiting):
            self._waiting.pop(number).done()
        self.segments.clear()
        if not self._closed:
            self._lost(self, error)


class _CannotStart(Exception):
    """The child says that it cannot make its group."""


def _started(settings: ChildSettings, descriptor: int) -> subprocess.Popen[bytes]:
    if not sys.executable or not hasattr(os, "memfd_create"):
        raise SettingsError(
            "a process group in a child process needs Linux and a Python interpreter of its own: "
            "use ProcessGroupGloo"
        )
    program = _PROGRAM.format(
        path=sys.path,
        descriptor=descriptor,
        parent=os.getpid(),
        factory=settings.factory,
        device=settings.device,
        timeout_s=settings.timeout.total_seconds(),
        most=settings.most,
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], pass_fds=[descriptor], stdin=subprocess.DEVNULL
    )


def _shut(line: Connection) -> None:
    """Wake whoever reads at either end, without freeing the descriptor under the own thread."""
    with socket.socket(fileno=os.dup(line.fileno())) as twin:
        twin.shutdown(socket.SHUT_RDWR)


def _ended(process: subprocess.Popen[bytes], patience_s: float) -> int:
    """Its exit status, once it has ended by itself or was killed."""
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
