"""A managed all-reduce: finished once, by whoever comes first, and failing only its own step."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
from helpers.steps import lone_step
from torch.distributed import Work
from torch.futures import Future

from torchft.errors import CollectiveError
from torchft.futures import future_wait
from torchft.manager.average import Average, Done
from torchft.manager.step import Step


class Sum(Work):
    """A sum that ends when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.future: Future[list[torch.Tensor]] = Future()
        self.timeouts: list[timedelta | None] = []

    def wait(self, timeout: timedelta | None = None) -> bool:
        self.timeouts.append(timeout)
        self.future.wait()
        return True

    def get_future(self) -> Future[list[torch.Tensor]]:
        return self.future


@pytest.fixture
def step() -> Step:
    return lone_step()


def test_wait_gives_the_mean(step: Step) -> None:
    tensor, work = torch.tensor([6.0]), Sum()
    work.future.set_result([tensor])
    Average(step, work, tensor, 3).wait()
    assert tensor.item() == 2.0


class TwoHalves(Sum):
    """What has a second half, whose first has arrived when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Future[None] = Future()
        self.advanced = 0

    def advance(self, timeout: timedelta | None = None) -> None:
        self.first.wait()
        self.advanced += 1


def test_the_second_half_can_be_begun_before_anybody_waits(step: Step) -> None:
    tensor, work = torch.tensor([6.0]), TwoHalves()
    average = Average(step, work, tensor, 1)
    work.first.set_result(None)
    average.advance()
    assert work.advanced == 1 and not average.is_completed()
    work.future.set_result([tensor])
    average.wait()
    average.advance()
    assert work.advanced == 1 and average.is_completed()


def test_a_first_half_that_fails_is_the_steps_error(step: Step) -> None:
    tensor, work = torch.tensor([6.0]), TwoHalves()
    average = Average(step, work, tensor, 1)
    work.first.set_exception(RuntimeError("the network broke"))
    average.advance()
    assert step.failed and average.is_completed()
    average.wait()
    assert work.timeouts == []


def test_an_average_is_divided_once_whoever_waits_and_how_often(step: Step) -> None:
    tensor, work = torch.tensor([8.0]), Sum()
    average = Average(step, work, tensor, 2)
    future = average.get_future()
    work.future.set_result([tensor])
    average.wait()
    average.wait()
    assert future.wait().item() == 4.0
    assert tensor.item() == 4.0


def test_the_future_completes_without_anybody_waiting(step: Step) -> None:
    tensor, work = torch.tensor([8.0]), Sum()
    future = Average(step, work, tensor, 2).get_future()
    work.future.set_result([tensor])
    assert future.done()
    assert future.value().item() == 4.0


def test_a_failure_is_the_error_of_its_own_step(step: Step) -> None:
    later = lone_step()
    work = Sum()
    average = Average(step, work, torch.tensor([1.0]), 2)
    future = average.get_future()
    work.future.set_exception(RuntimeError("connection reset"))
    assert future.done() and average.wait()
    assert step.error is not None
    assert isinstance(step.error.original_exception, CollectiveError)
    assert "connection reset" in str(step.error.original_exception)
    assert later.error is None


def test_the_first_error_of_a_step_is_kept(step: Step) -> None:
    for reason in ("the cause", "what came of it"):
        work = Sum()
        work.future.set_exception(RuntimeError(reason))
        Average(step, work, torch.tensor([1.0]), 2).wait()
    assert "the cause" in str(step.error.original_exception)  # type: ignore[union-attr]


class Clock:
    """What `Average` takes the time from."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("torchft.manager.average.time", clock)
    return clock


class Stuck(Sum):
    """One that gloo forgot: its wait ends by time alone."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: timedelta | None = None) -> bool:
        assert timeout is not None
        self._clock.now += timeout.total_seconds()
        raise RuntimeError("Operation timed out!")


@dataclass
class Among:
    """Members as the test wants them."""

    retired: bool = False
    lost: bool = False


def test_wait_keeps_its_timeout(step: Step, clock: Clock) -> None:
    """An old failing that must not come back: a wait that is given a timeout ignores it."""
    average = Average(step, Stuck(clock), torch.ones(1), 1, Among())
    average.wait(timedelta(milliseconds=120))
    assert clock.now == pytest.approx(0.12, abs=0.002)
    assert step.failed


def test_a_wait_without_a_time_of_its_own_ends_with_the_managers(step: Step, clock: Clock) -> None:
    managers = timedelta(seconds=8)
    Average(step, Stuck(clock), torch.ones(1), 1, Among(), timeout=managers).wait()
    assert clock.now == pytest.approx(8.0, abs=0.002)
    assert step.error is not None
    assert "no result in 8 s, the timeout" in str(step.error.original_exception)


@pytest.mark.parametrize("members", [Among(retired=True), Among(lost=True)])
def test_what_waits_for_a_member_that_left_is_given_up(
    step: Step, clock: Clock, members: Among
) -> None:
    Average(step, Stuck(clock), torch.ones(1), 1, members).wait()
    assert clock.now < 1
    assert step.error is not None
    assert "a member left" in str(step.error.original_exception)


def test_the_future_of_what_waits_for_a_member_that_left_completes(
    step: Step, clock: Clock
) -> None:
    tensor = torch.tensor([5.0])
    average = Average(step, Stuck(clock), tensor, 2, Among(lost=True))
    assert future_wait(average.get_future(), timedelta(seconds=5)).item() == 5.0
    assert step.failed


def test_done_leaves_the_tensor_alone() -> None:
    tensor = torch.tensor([5.0])
    done = Done(tensor)
    assert done.wait() and done.is_completed()
    assert done.get_future().wait() is tensor


def test_one_that_is_not_finite_is_the_error_of_its_step_and_leaves_its_peers_alone(
    step: Step,
) -> None:
    tensor, work = torch.tensor([1.0, float("nan")]), Sum()
    work.future.set_result([tensor])
    average = Average(step, work, tensor, 2, judged=True, name="a weight")
    average.wait()
    assert step.not_finite and not step.broken
    assert "1 of them in a weight" in str(step.error.original_exception)  # type: ignore[union-attr]
    assert tensor[0].item() == 0.5, "what it holds still reaches the gradients"


def test_without_a_name_it_is_for_who_asks(step: Step) -> None:
    tensor, work = torch.tensor([float("inf")]), Sum()
    work.future.set_result([tensor])
    average = Average(step, work, tensor, 2, judged=True)
    average.wait()
    assert not average.is_finite() and not step.failed


@pytest.mark.parametrize("nan_first", [True, False])
def test_a_failure_beside_nan_is_what_counts(step: Step, nan_first: bool) -> None:
    """Its peers must be freed, and the process group made anew."""

    def nan() -> None:
        tensor, work = torch.tensor([float("nan")]), Sum()
        work.future.set_result([tensor])
        Average(step, work, tensor, 2, judged=True, name="a weight").wait()

    def failure() -> None:
        work = Sum()
        work.future.set_exception(RuntimeError("connection reset"))
        Average(step, work, torch.ones(1), 2).wait()

    for event in (nan, failure) if nan_first else (failure, nan):
        event()
    assert step.broken and not step.not_finite
