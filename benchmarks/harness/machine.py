"""What a run was taken on, and what a process has used. Reads `/proc`, so Linux only.

CPU seconds hold on a busy machine where wall times do not.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["cpu_seconds", "describe", "forget_peak", "peak_mib", "resident_mib", "threads"]


def describe() -> dict[str, Any]:
    """Cores, how many processes wanted them in the last minute, and the versions that matter."""
    return {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def cpu_seconds(pid: int) -> float:
    """CPU time of all living threads of a process, to the nanosecond."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def resident_mib(pid: int) -> float:
    """Memory that the process has now."""
    return _status_mib(pid, "VmRSS")


def peak_mib(pid: int) -> float:
    """The most memory that the process ever had."""
    return _status_mib(pid, "VmHWM")


def forget_peak() -> float:
    """What this process has now without what it has freed, in MiB; its peak counts from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib(os.getpid())


def threads(pid: int) -> int:
    """How many threads the process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def _status_mib(pid: int, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"process {pid} has no {field}: it has ended")
