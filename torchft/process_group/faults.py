"""Process groups around another that swallow faults, or make them on purpose."""
# mypy: disable-error-code="override"

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import Work
from torch.futures import Future

from torchft.process_group.base import AnyAllreduceOptions, ProcessGroup
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.work import _DummyWork

__all__ = ["ErrorSwallowingProcessGroupWrapper", "FakeProcessGroupWrapper"]


class _WorkAround(Work):
    """Another work, whose end is told otherwise."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def _wait(self, timeout: timedelta | None) -> None:
        if timeout is None:
            self._work.wait()
        else:
            self._work.wait(timeout)

    def is_completed(self) -> bool:
        return self._work.is_completed()


class _SwallowingWork(_WorkAround):
    """Reports a failure instead of raising it; the tensors then are as the failure left them."""

    def __init__(
        self, group: ErrorSwallowingProcessGroupWrapper, work: Work, tensors: list[Tensor]
    ) -> None:
        super().__init__(work)
        self._group = group
        self._tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        try:
            self._wait(timeout)
        except Exception as error:
            self._group.report_error(error)
        return True

    def get_future(self) -> Future[Any]:
        swallowed: Future[Any] = Future()

        def arrived(done: Future[Any]) -> None:
            try:
                swallowed.set_result(done.value())
            except Exception as error:
                self._group.report_error(error)
                swallowed.set_result(self._tensors)

        self._work.get_future().add_done_callback(arrived)
        return swallowed


class ErrorSwallowingProcessGroupWrapper(ProcessGroupWrapper):
    """Keeps the first error of an all-reduce to itself; later ones do nothing until `configure`.

    Only all-reduce is guarded.
    """

    def __init__(self, pg: ProcessGroup) -> None:
        super().__init__(pg=pg)
        self._error: Exception | None = None

    def configure(self, *members: Any, **more: Any) -> None:
        """As the inner group; forgets the error."""
        self._error = None
        super().configure(*members, **more)

    def report_error(self, e: Exception) -> None:
        """Count `e` as the error of this configuration, unless it has one."""
        if self._error is None:
            self._error = e

    def error(self) -> Exception | None:
        """The error since the last configure."""
        return self._error

    def errored(self) -> Exception | None:
        """The error since the last configure, the inner group's included."""
        return self._error or super().errored()

    def allreduce(self, tensors: list[Tensor], opts: AnyAllreduceOptions) -> Work:
        """Never raises; after an error it has already ended and leaves the tensors alone."""
        if self._error is not None:
            return _DummyWork(tensors)
        try:
            return _SwallowingWork(self, super().allreduce(tensors, opts), tensors)
        except Exception as error:
            self.report_error(error)
            return _DummyWork(tensors)


class _FailingWork(_WorkAround):
    """Does the work and then fails all the same."""

    def __init__(self, work: Work, error: Exception) -> None:
        super().__init__(work)
        self._error = error

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._wait(timeout)
        raise self._error

    def get_future(self) -> Future[Any]:
        failing: Future[Any] = Future()
        self._work.get_future().add_done_callback(lambda _: failing.set_exception(self._error))
        return failing


class FakeProcessGroupWrapper(ProcessGroupWrapper):
    """Makes the next all-reduce fail with an error that a test chose."""

    def __init__(self, pg: ProcessGroup) -> None:
        super().__init__(pg=pg)
        self._next: Exception | None = None
        self._taking = threading.Lock()

    def configure(self, *members: Any, **more: Any) -> None:
        """As the inner group; forgets an error that was not used."""
        self._take()
        super().configure(*members, **more)

    def report_future_error(self, e: Exception) -> None:
        """The next all-reduce is carried out and then fails with `e`."""
        with self._taking:
            self._next = e

    def allreduce(self, tensors: list[Tensor], opts: AnyAllreduceOptions) -> Work:
        """As the inner group's, unless an error is due."""
        work = super().allreduce(tensors, opts)
        error = self._take()
        return work if error is None else _FailingWork(work, error)

    def _take(self) -> Exception | None:
        with self._taking:
            error, self._next = self._next, None
        return error
