"""Where a process's time goes: every moment of its main thread is in exactly one named bucket.

The buckets add up to the wall time since the process was created. Entering a bucket suspends the
one around it, leaving it resumes that one, so nothing is counted twice:

    with ledger.spending("compute"):
        loss.backward()                      # compute …
        with ledger.spending("communicate"):
            work.wait()                      # … communicate, not compute
    ledger.snapshot()                        # {"start": 2.1, "compute": 0.8, …}, in seconds

Time outside every bucket is `other`. It is measured as intervals of its own, not computed as a
remainder, so a large `other` means code that nobody named and not an error of the arithmetic.

Only the thread that made the ledger spends. Elsewhere `spending` does nothing: what a helper thread
does is not time that the training loop loses.
"""

from __future__ import annotations

import enum
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from torchft.errors import SettingsError

__all__ = ["Bucket", "Ledger", "process_age_s", "spent_between"]


class Bucket(enum.StrEnum):
    """What the main thread can be doing."""

    START = "start"
    """Process creation until the ledger is made (imports, the model), and set-up marked as such."""
    DATA = "data"
    """Waiting for and preparing batches."""
    COMPUTE = "compute"
    """Forward and backward."""
    QUORUM = "quorum"
    """Waiting for the lighthouse to say who takes part."""
    CONFIGURE = "configure"
    """Building the process group of a new quorum."""
    HEAL = "heal"
    """Fetching and loading a peer's state, or offering one's own."""
    COMMUNICATE = "communicate"
    """Inside a collective, or waiting for one."""
    VOTE = "vote"
    """Waiting for the ranks of this group to vote."""
    OPTIMIZER = "optimizer"
    """Inner and outer optimizer steps."""
    CHECKPOINT = "checkpoint"
    """Writing or reading durable checkpoints."""
    SETTLE = "settle"
    """The last quorum of a run, which heals whoever missed the last step."""
    OTHER = "other"
    """Outside every bucket above."""


class Ledger:
    """Seconds by bucket, from process creation until now.

    `clock` gives seconds and never goes back. `age_s` is the age of the process at this moment,
    in seconds, and is what the bucket `start` begins with.
    """

    __slots__ = ("_clock", "_current", "_outer", "_owner", "_seconds", "_since", "_spans")

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, age_s: float | None = None
    ) -> None:
        self._clock = clock
        self._owner = threading.get_ident()
        self._seconds = dict.fromkeys((str(bucket) for bucket in Bucket), 0.0)
        self._seconds["start"] = process_age_s() if age_s is None else age_s
        self._spans = {name: _Span(self, name) for name in self._seconds}
        # The bucket that runs now, since when, and the suspended ones around it.
        self._current = "other"
        self._outer: list[str] = []
        self._since = clock()

    def spending(self, bucket: Bucket | str) -> _Span:
        """A context in which the calling thread's time belongs to `bucket`. It can be nested.

        Raises:
            SettingsError: `bucket` is not one of `Bucket`.
        """
        span = self._spans.get(bucket)
        if span is None:
            raise SettingsError(f"no bucket {bucket!r} in the ledger: use one of {list(Bucket)}")
        return span

    def snapshot(self) -> dict[str, float]:
        """Seconds by bucket until now; their sum is the age of the process.

        Exact on the ledger's own thread. From another one a switch that happens at the same
        moment may be seen halfway.
        """
        seconds = self._seconds.copy()
        seconds[self._current] += self._clock() - self._since
        return seconds

    def _switch(self, bucket: str) -> None:
        now = self._clock()
        self._seconds[self._current] += now - self._since
        self._since = now
        self._current = bucket


class _Span:
    """The context of one bucket. It holds no state of its own, so one object serves every use."""

    __slots__ = ("_bucket", "_ledger")

    def __init__(self, ledger: Ledger, bucket: str) -> None:
        self._ledger = ledger
        self._bucket = bucket

    def __enter__(self) -> None:
        ledger = self._ledger
        if threading.get_ident() == ledger._owner:
            ledger._outer.append(ledger._current)
            ledger._switch(self._bucket)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ledger = self._ledger
        if threading.get_ident() == ledger._owner:
            ledger._switch(ledger._outer.pop())


def spent_between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Seconds by bucket between two snapshots of one ledger; empty buckets are left out."""
    spent = {bucket: seconds - before.get(bucket, 0.0) for bucket, seconds in after.items()}
    return {bucket: seconds for bucket, seconds in spent.items() if seconds > 0.0}


def process_age_s() -> float:
    """Seconds since this process was created, to about 10 ms.

    Known on Linux only (`/proc/self/stat`). Elsewhere it is 0: a ledger then begins at its birth.
    """
    try:
        with open("/proc/self/stat", "rb") as stat:
            # The second field is the command in brackets and may hold anything, spaces too.
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return 0.0
    born_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - born_s)
