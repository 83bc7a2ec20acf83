"""Cores, threads, open files and the clock of this machine."""

from __future__ import annotations

import ctypes
import os
import sys
import time

from torchft.cli.checks.check import Check

__all__ = ["clock", "open_files", "threads"]

YEAR_2024 = 1_704_067_200
"""Seconds since 1970. A clock before that was never set."""

LEAST_OPEN_FILES = 1024

STA_UNSYNC = 0x0040
"""From <sys/timex.h>: nothing keeps the clock right."""


def threads(omp: str | None, *, cores: int | None = None) -> Check:
    """`omp` is OMP_NUM_THREADS: how many threads each worker computes with."""
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    if omp is None:
        return Check.warn(
            "threads",
            f"OMP_NUM_THREADS is not set: each worker may compute with all {cores} cores",
            "with several workers on one machine, set it to cores divided by workers "
            "(torchrun sets 1 when there are several in one group)",
        )
    if not omp.isdigit() or int(omp) < 1:
        return Check.fail(
            "threads", f"OMP_NUM_THREADS={omp!r} is no number", f"set it from 1 to {cores}"
        )
    if int(omp) > cores:
        return Check.warn(
            "threads",
            f"OMP_NUM_THREADS={omp} on {cores} cores: threads will wait for each other",
            f"set it to {cores} or less",
        )
    return Check.ok("threads", f"OMP_NUM_THREADS={omp}, {cores} cores")


def open_files(limit: int | None = None) -> Check:
    """Each connection to a peer is an open file."""
    if limit is None:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < LEAST_OPEN_FILES:
        return Check.warn(
            "open files",
            f"at most {limit} a process, and every peer takes a few",
            f"raise it: ulimit -n {4 * LEAST_OPEN_FILES}",
        )
    return Check.ok("open files", f"at most {limit} a process")


def clock(*, now: float | None = None, synchronised: bool | None = None) -> Check:
    """Quorum ids start from the wall clock of the lighthouse; nothing else depends on it."""
    now = time.time() if now is None else now
    if now < YEAR_2024:
        return Check.fail(
            "clock",
            f"it says {time.strftime('%Y-%m-%d', time.gmtime(now))}",
            "set it: quorum ids must not come again after the lighthouse is restarted",
        )
    synchronised = kept_right() if synchronised is None else synchronised
    if synchronised is False:
        return Check.warn(
            "clock",
            "nothing keeps it right (the kernel says: unsynchronised)",
            "run an NTP client; a clock that is set back while the lighthouse restarts may bring "
            "old quorum ids back",
        )
    return Check.ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


def kept_right() -> bool | None:
    """Whether the kernel counts its clock as synchronised; None: unknown here."""
    if not sys.platform.startswith("linux"):
        return None
    timex = (ctypes.c_long * 64)()  # struct timex, read only: its first word, `modes`, stays 0
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.adjtimex(ctypes.byref(timex)) < 0:
        return None
    status = timex[5]  # modes, offset, freq, maxerror, esterror, status
    return not status & STA_UNSYNC
