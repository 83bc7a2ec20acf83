"""Process trees: who is in one, since when, and how to end all of it.

A torchrun agent starts each worker in a session of its own, so a signal to the agent's process
group reaches none of them. A tree is therefore read from parent ids, with the root stopped first:
a stopped agent neither starts a worker nor notices that one is gone. psutil remembers when each
process was created, so a number that the system has given to another process is left alone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from torchft.errors import TorchftError
from torchft.retry import wait_until

__all__ = [
    "MissingExtra",
    "born_at",
    "has_children",
    "is_dead",
    "kill_all",
    "kill_tree",
    "psutil",
    "tree",
]

Process = Any
"""A `psutil.Process`; psutil is imported only when needed and brings no types."""


class MissingExtra(TorchftError):
    """A package that only this feature needs is not installed."""


def psutil() -> ModuleType:
    """The psutil module.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtra(
            "process trees need psutil: in a checkout of this project, `pip install '.[demo]'` "
            "installs it"
        ) from None
    return psutil


def tree(pid: int) -> list[Process]:
    """The process and all that descend from it, the root first. Empty when it is gone."""
    ps = psutil()
    try:
        root = ps.Process(pid)
        return [root, *root.children(recursive=True)]
    except ps.NoSuchProcess:
        return []


def kill_tree(pid: int, *, timeout_s: float = 10.0) -> list[int]:
    """SIGKILL the process and everything below it; returns the ids of all of them.

    All are dead on return; if the root is a child of this process, its exit code is still to be
    collected.

    Raises:
        TimeoutError: some are still there after `timeout_s`, e.g. in an uninterruptible read.
    """
    with contextlib.suppress(psutil().NoSuchProcess):
        psutil().Process(pid).suspend()
    family = tree(pid)
    # The children first, and once more for what they had started before they died.
    kill_all(family[1:], timeout_s=timeout_s)
    family += [process for process in tree(pid) if process not in family]
    kill_all(family, timeout_s=timeout_s)
    return [process.pid for process in family]


def kill_all(processes: Iterable[Process], *, timeout_s: float = 10.0) -> None:
    """SIGKILL each that still lives and wait until all are dead.

    Raises:
        TimeoutError: some are still there after `timeout_s`.
    """
    ps = psutil()
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(ps.NoSuchProcess):
            process.kill()
    if not wait_until(lambda: all(map(is_dead, processes)), timeout_s):
        alive = [process.pid for process in processes if not is_dead(process)]
        raise TimeoutError(f"still alive {timeout_s:g} s after SIGKILL: {alive}")


def is_dead(process: Process) -> bool:
    """A zombie is dead: its parent, which may be stopped, has only not asked for its code yet."""
    ps = psutil()
    try:
        return not process.is_running() or process.status() == ps.STATUS_ZOMBIE
    except ps.NoSuchProcess:
        return True


def has_children(pid: int) -> bool:
    """Whether the main thread of a process has a child; False where there is no /proc."""
    try:
        return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    except OSError:
        return False


def born_at(pid: int) -> float | None:
    """When a process was created, on the clock of `time.monotonic()`, to about 10 ms.

    None when it is gone or where there is no /proc.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # The second field is the command in brackets and may hold anything, spaces too.
            ticks = int(stat.read().rpartition(b")")[2].split()[19])
    except OSError:
        return None
    since_boot = ticks / os.sysconf("SC_CLK_TCK")
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    return time.monotonic() - age
