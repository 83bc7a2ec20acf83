"""A process group in a child process: what hangs or crashes there does not take the parent along.

One wrapper for every kind; a kind is the group that its child makes, and on which device. The child
starts in the background when the group is made, lives through all configures, and is replaced when
it dies or hangs. Tensors are copied into shared memory and the result back: the user's tensors are
never in the hands of a process that may be killed at any moment, and after a failure they are as
they were before the operation. Tensors on a device travel by way of the host.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

import functools
import importlib
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work
from torch.utils._pytree import tree_leaves

from torchft.arguments import check_integer
from torchft.errors import (
    ChildLostError,
    CollectiveError,
    MeetingTimeoutError,
    NotConfiguredError,
    SettingsError,
)
from torchft.process_group.accelerator import NCCL, XCCL, Kind
from torchft.process_group.account import Account, payer
from torchft.process_group.adapters import Members
from torchft.process_group.base import ProcessGroup
from torchft.process_group.child import Abort, Options, Reply
from torchft.process_group.child_process import ChildProcess, ChildSettings, ChildWork
from torchft.process_group.rendezvous import Seat
from torchft.process_group.shared_memory import Segment, place, view

__all__ = [
    "ProcessGroupBaby",
    "ProcessGroupBabyGloo",
    "ProcessGroupBabyNCCL",
    "ProcessGroupBabyXCCL",
]

_GRACE_S = 4.0
"""So long beyond the timeout does a configure wait for what is said of a child that hangs."""

_TENSORS: dict[str, tuple[str, ...]] = {
    "allreduce": ("rw",),
    "allreduce_coalesced": ("rw",),
    "allgather": ("w", "r"),
    "allgather_into_tensor_coalesced": ("w", "r"),
    "alltoall_base": ("w", "r"),
    "barrier": (),
    "broadcast": ("rw",),
    "send": ("r",),
    "recv": ("w",),
    "reduce_scatter": ("w", "r"),
    "reduce_scatter_tensor_coalesced": ("w", "r"),
}
"""Operation → what it does with the tensors of its first arguments: reads them, writes them."""


def _in_child(name: str) -> Callable[..., Work]:
    """The operation `name`, done by the child."""
    declared = getattr(ProcessGroup, name)
    signature = inspect.signature(declared)

    @functools.wraps(declared)
    def operation(self: ProcessGroupBaby, *args: Any, **options: Any) -> Work:
        given = signature.bind(self, *args, **options).args[1:]
        return self._operate(name, list(given))

    return operation


class ProcessGroupBaby(ProcessGroup):
    """The group that `factory` makes, in a child process.

    A subclass names the `factory`, as `module:name` of what makes one of our process groups from a
    timeout, and the `child_device` on which that wants its tensors.

    Args:
        timeout: deadline of each configure and each operation; a number is in seconds. The first
            configure waits that long also for the child to start, which takes some seconds.
        max_active_work: how many operations may be under way at once. One more waits.

    Raises:
        SettingsError: a timeout or number that is not above 0, or no device of that kind.
    """

    factory = ""
    child_device = "cpu"

    def __init__(
        self, timeout: timedelta | float = timedelta(seconds=60), *, max_active_work: int = 64
    ) -> None:
        super().__init__()
        self._timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        if self._timeout <= timedelta(0):
            raise SettingsError(f"timeout={timeout} is no timeout: give one above 0")
        check_integer("max_active_work", max_active_work, least=1)
        self._check()
        self._most = max_active_work
        self._room = threading.BoundedSemaphore(max_active_work)
        self._active = 0
        self._counting = threading.Lock()
        self._changing = threading.RLock()
        self._order = threading.Lock()  # from laying out the tensors to sending the request
        self._sent = Account()
        self._size: int | None = None
        self._error: Exception | None = None
        self._children: list[ChildProcess] = []
        """The present one, or none after shutdown."""
        self._finalizer = weakref.finalize(self, _close, self._children, os.getpid())
        self._start_child()

    # ------------------------------------------------------------------ members

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        group_rank: int | None = None,
        group_world_size: int | None = None,
        global_ranks: list[int] | None = None,
    ) -> None:
        """Join `world_size` members as `rank`, in the child that there is, or a new one.

        Raises:
            MeetingTimeoutError: a member did not come, or the child did not start, in time.
            CollectiveError: the store or a member is gone. The next configure may succeed.
            ChildLostError: the child died meanwhile. The next configure uses a new one.
        """
        Seat(rank, world_size, replica_id)
        more = (quorum_id, group_rank, group_world_size, global_ranks)
        members = Members(store_addr, replica_id, rank, world_size, *more)
        self._abandon("configured anew", tell=False)
        self._size, self._error = None, None
        child, work = self._living(), ChildWork()
        child.configure(work, members)
        patience_s = self._timeout.total_seconds() + (_GRACE_S if child.stands.is_set() else 0.0)
        try:
            work.wait(timedelta(seconds=patience_s))
        except CollectiveError as error:
            if work.is_completed():
                raise
            raise MeetingTimeoutError(
                f"timed out after {self._timeout.total_seconds():g} seconds: the child process is "
                "still starting, which takes some seconds: give a longer timeout"
            ) from error
        self._size = world_size

    def abort(self, errored: bool = True) -> None:
        """Abandon what is pending; with `errored`, `errored()` says so until the next configure."""
        error = self._abandon("aborted", tell=True)
        if not errored:
            self._size = None
        elif self._size is not None:
            self._error = error

    def shutdown(self) -> None:
        """End the child and free everything. A later configure starts another."""
        with self._changing:
            self._size, self._error = None, None
            children = list(self._children)
            self._children.clear()
        for child in children:
            child.close()

    def errored(self) -> Exception | None:
        """Why this group cannot be used until the next configure."""
        return self._error

    def set_timeout(self, timeout: timedelta) -> None:
        """Deadline of each configure and operation from now on."""
        with self._changing:  # a child that is being started has the old one, and is told later
            self._timeout = timeout
            children = list(self._children)
        for child in children:
            child.set_timeout(timeout)

    def num_active_work(self) -> int:
        """How many operations the child has under way."""
        return self._active

    @property
    def bytes_sent(self) -> int:
        """Payload handed to the wire by all operations that have ended."""
        return self._sent.bytes_sent

    @property
    def child_pid(self) -> int | None:
        """Process id of the child; None after shutdown."""
        children = list(self._children)
        return children[0].process.pid if children else None

    def size(self) -> int:
        """How many members there are.

        Raises:
            NotConfiguredError: it is not configured.
        """
        if self._size is None:
            raise NotConfiguredError(
                f"{type(self).__name__} has no members yet: call configure first, or give it to a "
                "Manager, which configures it in each new quorum"
            )
        return self._size

    def getBackendName(self) -> str:
        """`torchft-baby-` and the kind, such as `torchft-baby-gloo`."""
        return f"torchft-baby-{self.factory.rpartition('ProcessGroup')[2].lower()}"

    def _check(self) -> None:
        """Refuse to be made where the group in the child could not work."""
        module, _, name = self.factory.partition(":")
        if not hasattr(importlib.import_module(module), name):
            raise SettingsError(f"{type(self).__name__} has no group to run: {self.factory!r}")

    # ------------------------------------------------------------------ the child

    def _start_child(self) -> ChildProcess:
        lost = weakref.WeakMethod(self._child_lost)
        settings = ChildSettings(self.factory, self._place(), self._timeout, self._most)
        child = ChildProcess(settings, lambda *news: (lost() or _nobody)(*news))
        self._children[:] = [child]
        return child

    def _place(self) -> str:
        if self.child_device == "cpu":
            return "cpu"
        module = torch.get_device_module(self.child_device)
        return f"{self.child_device}:{module.current_device()}"

    def _living(self) -> ChildProcess:
        with self._changing:
            if self._children and not self._children[0].lost:
                return self._children[0]
            return self._start_child()

    def _child_lost(self, child: ChildProcess, error: ChildLostError) -> None:
        """On the child's thread. Another one starts while the members learn of it."""
        with self._changing:
            if child not in self._children:
                return
            self._error = error
            if child.stands.is_set():  # one that could not start is not started for ever
                self._start_child()

    def _abandon(self, why: str, *, tell: bool) -> CollectiveError:
        error = CollectiveError(f"the process group in the child process was {why}")
        for child in list(self._children):
            child.abandon(error)
            if tell:
                child.tell(Abort())
        return error

    # ------------------------------------------------------------------ operations

    def _operate(self, name: str, arguments: list[Any]) -> Work:
        """Start an operation in the child.

        Raises:
            CollectiveError: the group was aborted, or no operation of those under way ended in
                time to make room for this one.
            ChildLostError: the child died, or the group was shut down.
            NotConfiguredError: the group was not configured.
        """
        if not self._room.acquire(timeout=self._timeout.total_seconds()):
            raise CollectiveError(
                f"{name}: {self._most} operations (max_active_work) are under way, and none ended "
                f"in {self._timeout.total_seconds():g} s"
            )
        try:
            with self._order:
                return self._started(self._usable(name), name, arguments)
        except BaseException:
            self._room.release()
            raise

    def _usable(self, name: str) -> ChildProcess:
        children = list(self._children)
        if not children:
            raise ChildLostError(f"{name}: the handle is closed: the process group was shut down")
        if self._error is not None:
            raise type(self._error)(f"{name}: {self._error}")
        self.size()
        return children[0]

    def _started(self, child: ChildProcess, name: str, arguments: list[Any]) -> Work:
        uses = _TENSORS[name]
        trees = arguments[: len(uses)]
        slots, nbytes = place(trees, 0)
        segment = child.segments.take(nbytes) if uses else None
        reads: list[Any] = []
        writes: list[Any] = []
        for tree, placed, use in zip(trees, slots, uses, strict=True):
            pairs = list(zip(tree_leaves(tree), tree_leaves(placed), strict=True))
            reads += pairs if "r" in use else []
            writes += pairs if "w" in use else []
        if segment is not None:
            _copy_in(segment, reads)
        work = self._work(child, segment, writes, payer())
        parts = [*slots, *map(Options.of, arguments[len(uses) :])]
        self._count(1)
        try:
            child.start(
                work,
                name,
                segment.number if segment else 0,
                parts,
                [slot for _, slot in reads],
                [slot for _, slot in writes],
            )
        except BaseException:
            self._count(-1)
            raise
        return work

    def _count(self, more: int) -> None:
        with self._counting:
            self._active += more

    def _work(
        self,
        child: ChildProcess,
        segment: Segment | None,
        writes: list[Any],
        account: Account | None,
    ) -> ChildWork:
        def keep(reply: Reply) -> None:
            for tensor, slot in writes:
                assert segment is not None
                tensor.detach().copy_(view(segment.memory, slot))
            for one in (self._sent, account):
                if one is not None:
                    one.add(reply.sent)

        def done() -> None:
            if segment is not None:
                child.segments.give_back(segment)
            self._count(-1)
            self._room.release()

        return ChildWork([tensor for tensor, _ in writes], keep=keep, done=done)

    allreduce = _in_child("allreduce")
    allreduce_coalesced = _in_child("allreduce_coalesced")
    allgather = _in_child("allgather")
    allgather_into_tensor_coalesced = _in_child("allgather_into_tensor_coalesced")
    alltoall_base = _in_child("alltoall_base")
    barrier = _in_child("barrier")
    broadcast = _in_child("broadcast")
    send = _in_child("send")
    recv = _in_child("recv")
    reduce_scatter = _in_child("reduce_scatter")
    reduce_scatter_tensor_coalesced = _in_child("reduce_scatter_tensor_coalesced")


class ProcessGroupBabyGloo(ProcessGroupBaby):
    """`ProcessGroupGloo` in a child process. Linux only."""

    factory = "torchft.process_group:ProcessGroupGloo"


class _OnDevice(ProcessGroupBaby):
    """Of a backend that torch may lack, for a device that the machine may lack."""

    kind: Kind

    def _check(self) -> None:
        self.kind.check(type(self).__name__)


class ProcessGroupBabyNCCL(_OnDevice):
    """`ProcessGroupNCCL` in a child process, by way of the host. Never run on a GPU yet."""

    factory = "torchft.process_group:ProcessGroupNCCL"
    child_device = "cuda"
    kind = NCCL


class ProcessGroupBabyXCCL(_OnDevice):
    """`ProcessGroupXCCL` in a child process, by way of the host. Never run on an XPU yet."""

    factory = "torchft.process_group:ProcessGroupXCCL"
    child_device = "xpu"
    kind = XCCL


def _copy_in(segment: Segment, reads: list[Any]) -> None:
    for tensor, slot in reads:
        view(segment.memory, slot).copy_(tensor.detach())


def _close(children: list[ChildProcess], pid: int) -> None:
    if os.getpid() == pid:
        for child in children:
            child.close()


def _nobody(child: ChildProcess, error: ChildLostError) -> None:
    """The group is gone, and with it who could be told."""
