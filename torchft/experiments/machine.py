"""One line about the machine that figures were measured on, to stand above them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

__all__ = ["describe_machine"]

_CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: torch.device | str | None = None) -> str:
    """`2 cores of Intel(R) Xeon(R), 1 thread, Linux x86_64, Python 3.12.1, torch 2.7.0`.

    Args:
        device: where the models were; a GPU is named first.
    """
    threads = torch.get_num_threads()
    parts = [
        f"{_cores()} cores of {_processor()}",
        f"{threads} thread{'s' if threads > 1 else ''}",
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    if device is not None and torch.device(device).type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    return ", ".join(parts)


def _cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor(cpuinfo: Path = _CPUINFO) -> str:
    """Its name; of a machine that does not tell, its architecture."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.processor() or platform.machine())
