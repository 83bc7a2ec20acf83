"""A collective that has already ended: for operations that have nothing to wait for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import Work
from torch.futures import Future

__all__ = ["_DummyWork"]


class _DummyWork(Work):
    """Done from the start; its future holds `result`."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result
        self._future: Future[Any] = Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """True at once."""
        return True

    def get_future(self) -> Future[Any]:
        """The completed future."""
        return self._future

    def result(self) -> Any:
        """What the operation returned."""
        return self._result

    def is_completed(self) -> bool:
        """True."""
        return True

    def is_success(self) -> bool:
        """True."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def block_current_stream(self) -> None:
        """Nothing to wait for."""
