"""The child process of a subprocess group: has the real group, and does what its parent asks.

It starts by `python -c`, so the user's main module is not run again. The parent's requests are done
in order, on the main thread; what may take long (a configure, the end of an operation) is waited
for on other threads. The tensors lie in shared memory; only their places cross the pipe. The child
ends when the pipe does, or when its parent is another than at first.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from torchft import errors
from torchft.coordination import watch_parent
from torchft.errors import CollectiveError
from torchft.process_group import adapters
from torchft.process_group.adapters import Members
from torchft.process_group.shared_memory import Slot, mapped, view
from torchft.process_group.watchdog import DeviceWork

__all__ = [
    "Abort",
    "Configure",
    "Failure",
    "NewSegment",
    "Operation",
    "Options",
    "Reply",
    "SetTimeout",
    "main",
]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a torch operation, which cannot be pickled themselves."""

    name: str
    values: dict[str, Any]

    @staticmethod
    def of(given: Any) -> Any:
        """What stands for `given` on the way; a ReduceOp, a number or None stands for itself."""
        name = type(given).__name__
        if not name.endswith("Options"):
            return given
        names = [one for one in dir(given) if not one.startswith("_")]
        return Options(name, {one: getattr(given, one) for one in names})

    def restored(self) -> Any:
        """Options of torch's with the same values."""
        options = getattr(distributed_c10d, self.name)()
        for name, value in self.values.items():
            setattr(options, name, value)
        return options


@dataclass(frozen=True, slots=True)
class Configure:
    """Asks to have the group made anew among these members."""

    number: int
    """Of the request; its reply has the same."""
    members: Members


@dataclass(frozen=True, slots=True)
class Operation:
    """Start an operation of the group."""

    number: int
    name: str
    segment: int
    """In which its tensors lie; 0 if it has none."""
    arguments: list[Any]
    """With slots in the place of tensors."""
    reads: list[Slot]
    """Those that are read."""
    writes: list[Slot]
    """Those that have the result."""


@dataclass(frozen=True, slots=True)
class NewSegment:
    """Tells of a new segment, whose descriptor follows in the pipe."""

    number: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Asks to abandon everything that is pending."""


@dataclass(frozen=True, slots=True)
class SetTimeout:
    """Of each configure and operation from now on."""

    timeout: timedelta


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception, as it travels through the pipe."""

    kind: str
    text: str

    @staticmethod
    def of(error: BaseException) -> Failure:
        """What says the same of `error`."""
        return Failure(type(error).__name__, str(error))

    def restored(self) -> Exception:
        """The same exception where it is one of ours or a timeout, else a CollectiveError."""
        if self.kind in errors.__all__:
            kind: type[Exception] = getattr(errors, self.kind)
            return kind(self.text)
        if self.kind in ("TimeoutError", "NotImplementedError"):
            return {"TimeoutError": TimeoutError}.get(self.kind, NotImplementedError)(self.text)
        return CollectiveError(self.text)


@dataclass(frozen=True, slots=True)
class Reply:
    """A request has been done, or has failed. Number 0: the child stands."""

    number: int
    failure: Failure | None = None
    sent: int = 0
    """Payload bytes that the operation handed to the wire."""


@dataclass
class _Child:
    line: Connection
    group: Any
    """One of our process groups."""
    device: torch.device
    waiting: ThreadPoolExecutor
    configuring: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    segments: dict[int, Tensor] = field(default_factory=dict)
    answering: threading.Lock = field(default_factory=threading.Lock)

    def serve(self) -> None:
        """Do what is asked until the pipe ends."""
        while True:
            request = self.line.recv()
            if isinstance(request, Operation):
                self._start(request)
            elif isinstance(request, NewSegment):
                self._map(request)
            elif isinstance(request, Configure):
                self.group.abort()  # an earlier configure may still be under way
                self.configuring.submit(self._configure, request)
            elif isinstance(request, SetTimeout):
                self.group.set_timeout(request.timeout)
            elif isinstance(request, Abort):
                self.group.abort()

    def answer(self, number: int, error: BaseException | None = None, sent: int = 0) -> None:
        failure = None if error is None else Failure.of(error)
        with self.answering:
            self.line.send(Reply(number, failure, sent))

    def _map(self, request: NewSegment) -> None:
        descriptor = recv_handle(self.line)
        self.segments[request.number] = mapped(descriptor, request.nbytes)
        os.close(descriptor)

    def _configure(self, request: Configure) -> None:
        try:
            adapters.configure(self.group, request.members)
        except BaseException as error:
            self.answer(request.number, error)
        else:
            self.answer(request.number)

    def _start(self, request: Operation) -> None:
        before = self.group.bytes_sent
        try:
            staged = self._staged(request)
            arguments = [_filled(one, staged) for one in request.arguments]
            work = getattr(self.group, request.name)(*arguments)
        except BaseException as error:
            self.answer(request.number, error)
            return
        sent = self.group.bytes_sent - before
        self.waiting.submit(self._finish, request, work, staged, sent)

    def _staged(self, request: Operation) -> dict[Slot, Tensor]:
        """Slot → its tensor, on the device of the group."""
        return {
            slot: view(self.segments[request.segment], slot).to(self.device)
            for slot in {*request.reads, *request.writes}
        }

    def _finish(self, request: Operation, work: Any, staged: dict[Slot, Tensor], sent: int) -> None:
        try:
            if isinstance(work, DeviceWork):
                work.wait_on_host()
            work.wait()
            if self.device.type != "cpu":
                for slot in request.writes:
                    view(self.segments[request.segment], slot).copy_(staged[slot])
        except BaseException as error:
            self.answer(request.number, error)
        else:
            self.answer(request.number, sent=sent)


def _filled(argument: Any, staged: dict[Slot, Tensor]) -> Any:
    """The argument with tensors in the place of slots, and torch's options again."""
    if isinstance(argument, Slot):
        return staged[argument]
    if isinstance(argument, Options):
        return argument.restored()
    if isinstance(argument, list):
        return [_filled(part, staged) for part in argument]
    return argument


def main(
    descriptor: int, parent: int, factory: str, device: str, timeout_s: float, most: int
) -> None:
    """Serve at the pipe `descriptor` until it ends.

    Args:
        parent: process id of the parent.
        factory: `module:name` of what makes the group from its timeout.
        device: on which the group wants its tensors.
        timeout_s: deadline of each configure and operation, in seconds.
        most: how many operations may be under way at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    watch_parent()
    if os.getppid() != parent:  # it ended before that
        os._exit(0)
    torch.set_num_threads(1)
    line = Connection(descriptor)
    module, _, name = factory.partition(":")
    at = torch.device(device)
    try:
        if at.type != "cpu":
            torch.get_device_module(at).set_device(at)
        group = getattr(importlib.import_module(module), name)(timedelta(seconds=timeout_s))
        child = _Child(line, group, at, ThreadPoolExecutor(most))
        child.answer(0)
    except Exception as error:
        line.send(Reply(0, Failure.of(error)))
        os._exit(1)
    try:
        child.serve()
    except (EOFError, OSError):  # the parent is gone, or has shut the group down
        os._exit(0)
