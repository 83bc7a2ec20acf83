"""Who pays for what is sent, when several steps share one process group.

    account = Account()
    with paid_by(account):
        group.allreduce([gradient], ReduceOp.SUM)
    account.bytes_sent                 # of that operation, whatever other threads sent meanwhile

An operation is paid by the account of the thread that starts it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Account", "paid_by", "payer"]


class Account:
    """Counts the payload bytes that were handed to the wire."""

    def __init__(self) -> None:
        self.bytes_sent = 0
        self._counting = threading.Lock()  # DDP's hooks communicate from autograd's threads

    def add(self, sent: int) -> None:
        """Count `sent` more bytes, from any thread."""
        with self._counting:
            self.bytes_sent += sent


class _Current(threading.local):
    account: Account | None = None


_current = _Current()


@contextmanager
def paid_by(account: Account) -> Iterator[None]:
    """What this thread starts in here is also counted by `account`."""
    before = payer()
    _current.account = account
    try:
        yield
    finally:
        _current.account = before


def payer() -> Account | None:
    """Whose account this thread's operations are counted by."""
    return _current.account
