"""Every environment variable that the package reads, and the only place where it reads them.

A variable wins over the argument it stands for, everywhere that argument is used. Timeouts are
whole seconds.
"""

from __future__ import annotations

import os
from datetime import timedelta

from torchft.errors import SettingsError

__all__ = [
    "CONGESTION",
    "CONNECT_TIMEOUT_SEC",
    "GLOO_SOCKET_IFNAME",
    "JOB_ID",
    "LIGHTHOUSE",
    "MANAGER_PORT",
    "QUORUM_RETRIES",
    "QUORUM_TIMEOUT_SEC",
    "STEP_RECORDS",
    "TIMEOUT_SEC",
    "USE_BUCKETIZATION",
    "for_child",
    "integer",
    "required",
    "text",
    "timeout",
    "under_torchrun",
]

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
"""Address of the lighthouse, `http://host:port`. Needed on rank 0 of each group."""
MANAGER_PORT = "TORCHFT_MANAGER_PORT"
"""Port of the manager server; 0 takes a free one."""
TIMEOUT_SEC = "TORCHFT_TIMEOUT_SEC"
"""Deadline of a collective, a vote, a transfer of state."""
QUORUM_TIMEOUT_SEC = "TORCHFT_QUORUM_TIMEOUT_SEC"
"""Deadline of a quorum."""
CONNECT_TIMEOUT_SEC = "TORCHFT_CONNECT_TIMEOUT_SEC"
"""Deadline of each connection to the lighthouse, a manager or the store."""
GLOO_SOCKET_IFNAME = "GLOO_SOCKET_IFNAME"
"""Network interface for gloo, such as `eth0`; unset: that of the host's own name. Torch's."""
CONGESTION = "TORCHFT_CONGESTION"
"""TCP congestion control of averages and heals, such as `bbr`; unset: the system's."""
QUORUM_RETRIES = "TORCHFT_QUORUM_RETRIES"
"""How often a failed quorum request is sent again before its deadline."""
STEP_RECORDS = "TORCHFT_STEP_RECORDS"
"""File that gets one JSON line for each step of this rank."""
JOB_ID = "JOB_ID"
"""Name of the job, in structured log events."""
USE_BUCKETIZATION = "TORCHFT_USE_BUCKETIZATION"
"""`True` makes DiLoCo send its pseudo-gradient in buckets."""


def text(name: str, default: str | None = None) -> str | None:
    """The variable as it stands, or `default` when it is unset or empty."""
    return os.environ.get(name) or default


def required(name: str, why: str) -> str:
    """The variable, or a SettingsError that says what it is for."""
    value = text(name)
    if value is None:
        raise SettingsError(f"the environment variable {name} is not set: {why}")
    return value


def integer(name: str, default: int) -> int:
    """The variable as a whole number; SettingsError when it is none."""
    value = text(name)
    if value is None:
        return default
    try:
        return int(value)
    except ValueError:
        raise SettingsError(f"{name}={value!r} is not a whole number") from None


def timeout(name: str, default: timedelta) -> timedelta:
    """The variable as a timeout of whole seconds; it wins over `default`."""
    if text(name) is None:
        return default
    seconds = integer(name, 0)
    if seconds <= 0:
        raise SettingsError(f"{name}={seconds} is no timeout: give a number of seconds above 0")
    return timedelta(seconds=seconds)


def for_child(**changes: str | None) -> dict[str, str]:
    """This process's whole environment with changes, for a child; None takes a variable out."""
    environment = {**os.environ, **changes}
    return {name: value for name, value in environment.items() if value is not None}


def under_torchrun() -> bool:
    """Whether a torchrun agent started this process."""
    return text("TORCHELASTIC_RUN_ID") is not None
