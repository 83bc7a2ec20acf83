"""Operations that a device runs by itself: who waits for them, and what ends one that hangs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore, ReduceOp, Work

from torchft.errors import CollectiveError
from torchft.process_group.generation import Generation
from torchft.process_group.rendezvous import Member, Seat
from torchft.process_group.watchdog import DeviceWork, Watchdog, wait_in_stream

SECOND = timedelta(seconds=1)


class _OnDevice(Work):
    """Ends when the test says so; `waited`: how often a stream was made to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.ended, self.waited = False, 0

    def is_completed(self) -> bool:
        return self.ended

    def wait(self, timeout: timedelta | None = None) -> bool:
        assert timeout is None, "torch's own wait would abort the communicator then"
        self.waited += 1
        return True


class _Time:
    """A clock and a timer that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def after(self, seconds: float, callback: Callable[[], None]) -> None:
        self.due.append((self.now + seconds, callback))

    def move(self, seconds: float) -> None:
        until = self.now + seconds
        while self.due and (first := min(self.due, key=lambda one: one[0]))[0] <= until:
            self.due.remove(first)
            self.now = first[0]
            first[1]()
        self.now = until


class _Owner:
    def __init__(self, time: _Time) -> None:
        self.reasons: list[str] = []
        self.watchdog = Watchdog(self.expire, after=time.after, clock=lambda: time.now)

    def expire(self, reason: str) -> None:
        self.reasons.append(reason)


def test_an_operation_that_hangs_is_given_up_at_its_deadline_and_once() -> None:
    time = _Time()
    owner = _Owner(time)
    owner.watchdog.watch(_OnDevice(), SECOND)
    owner.watchdog.watch(_OnDevice(), SECOND)
    time.move(0.9)
    assert owner.reasons == []
    time.move(0.2)
    assert owner.reasons == ["an operation had no result in 1 s, the timeout"]
    time.move(10)
    assert len(owner.reasons) == 1


def test_operations_that_end_in_time_disturb_nobody_and_are_not_kept() -> None:
    time = _Time()
    owner = _Owner(time)
    works = [_OnDevice() for _ in range(1000)]
    for work in works:
        owner.watchdog.watch(work, SECOND)
        work.ended = True
        time.move(0.01)
    assert owner.reasons == []
    time.move(2)
    assert not time.due
    owner.watchdog.watch(_OnDevice(), SECOND)  # it looks again for the next one
    time.move(1)
    assert owner.reasons != []


def test_a_shorter_deadline_that_is_set_later_is_kept_as_well() -> None:
    time = _Time()
    owner = _Owner(time)
    owner.watchdog.watch(_OnDevice(), timedelta(seconds=60))
    owner.watchdog.watch(_OnDevice(), SECOND)
    time.move(1)
    assert owner.reasons == ["an operation had no result in 1 s, the timeout"]


def test_a_timer_keeps_no_owner_alive() -> None:
    time = _Time()
    owner = _Owner(time)
    owner.watchdog.watch(_OnDevice(), SECOND)
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
    time.move(2)


# ---------------------------------------------------------------------- in a generation


class _Backend:
    """Starts what the test ends."""

    def __init__(self) -> None:
        self.works: list[_OnDevice] = []

    def allreduce(self, tensors: Any, opts: Any) -> Work:
        self.works.append(_OnDevice())
        return self.works[-1]


class _Control:
    on_device = True

    def __init__(self) -> None:
        self.said: str | None = None
        self.ends = 0

    def end(self, backend: Any) -> None:
        self.ends += 1

    def lost(self, backend: Any) -> bool:
        return self.said is not None

    def failure(self, backend: Any) -> str | None:
        return self.said


def _generation(timeout: timedelta = timedelta(minutes=1)) -> tuple[Generation, _Backend, _Control]:
    backend, control = _Backend(), _Control()
    made = Generation(
        backend,
        name="host:1/quorum",
        rank=0,
        members=[Member.here(Seat(0, 1, "me"), None)],
        store=HashStore(),
        control=control,
        timeout=timeout,
    )
    return made, backend, control


ON_DEVICE = torch.empty(3, device="meta")
"""As far as anybody here can tell, a tensor of a GPU."""


def test_whoever_waits_holds_up_the_stream_and_not_the_host() -> None:
    generation, backend, _ = _generation()
    work = generation.allreduce([ON_DEVICE], ReduceOp.SUM)
    assert isinstance(work, DeviceWork) and not work.is_completed()
    assert work.wait()
    wait_in_stream(work, timedelta(milliseconds=50))
    assert backend.works[0].waited == 2
    with pytest.raises(CollectiveError, match=r"no result in 0\.01 s"):
        work.wait(timedelta(milliseconds=10))
    backend.works[0].ended = True
    assert work.wait(SECOND)


def test_after_an_abort_a_wait_says_why_and_the_control_has_ended_the_backend_once() -> None:
    generation, _, control = _generation()
    work = generation.allreduce([ON_DEVICE], ReduceOp.SUM)
    generation.retire("the lighthouse has lost replica_1")
    generation.retire("again")
    assert control.ends == 1
    for wait in (work.wait, lambda: work.wait(SECOND), work.block_current_stream):
        with pytest.raises(CollectiveError, match="has lost replica_1"):
            wait()


def test_what_the_backend_finds_by_itself_retires_the_generation() -> None:
    generation, _, control = _generation()
    assert generation.error is None and not generation.lost
    control.said = "COMM_ERROR"
    assert generation.lost
    assert "its backend reports COMM_ERROR" in str(generation.error)
    assert generation.retired and control.ends == 1


def test_the_managers_timeout_limits_that_of_the_group_and_never_lengthens_it() -> None:
    generation, _, _ = _generation(timeout=timedelta(seconds=30))
    given: list[timedelta] = []
    generation._watchdog.watch = lambda work, timeout: given.append(timeout)  # type: ignore
    for manager in (timedelta(seconds=5), timedelta(minutes=5)):
        generation.limit(manager)
        generation.allreduce([ON_DEVICE], ReduceOp.SUM)
    assert given == [timedelta(seconds=5), timedelta(seconds=30)]


def test_tensors_of_the_host_are_waited_for_as_ever() -> None:
    generation, backend, _ = _generation()
    assert generation.allreduce([torch.ones(3)], ReduceOp.SUM) is backend.works[0]
