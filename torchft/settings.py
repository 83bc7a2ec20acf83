"""Every environment variable that the package reads, and the only place where it reads them.

The rule, in every part of the package: an explicit argument (or flag) wins over the variable, and
the variable over the default. `argument_first` implements it. The exceptions are the variables in
`OVERRIDING`: they win over the argument, so that the timeouts of a job can be changed without
editing its script, as in torchft. They are read with the argument as the default. Timeouts are
whole seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from torchft.arguments import boolean_of, check_integer, check_number, integer_from, number_from
from torchft.errors import MissingVariableError

__all__ = [
    "CONGESTION",
    "CONNECT_TIMEOUT_SEC",
    "DILOCO_AUTH_TOKEN",
    "DILOCO_AUTH_TOKEN_FILE",
    "DILOCO_BF16_COMM",
    "DILOCO_CODEC",
    "DILOCO_DYLU",
    "DILOCO_HEARTBEAT_INTERVAL",
    "DILOCO_NUM_FRAGMENTS",
    "DILOCO_SERVER",
    "DILOCO_SYNC_EVERY",
    "DILOCO_TLS_CA",
    "DILOCO_WORKER_ID",
    "GLOO_SOCKET_IFNAME",
    "JOB_ID",
    "LIGHTHOUSE",
    "LIGHTHOUSE_TIMEOUT_SEC",
    "MANAGER_PORT",
    "OVERRIDING",
    "QUORUM_RETRIES",
    "QUORUM_TIMEOUT_SEC",
    "STEP_RECORDS",
    "TIMEOUT_SEC",
    "USE_BUCKETIZATION",
    "agent_serves_no_store",
    "argument_first",
    "boolean_or_none",
    "for_child",
    "get_timeout",
    "integer",
    "integer_or_none",
    "number_or_none",
    "path_or_none",
    "required",
    "set_during",
    "text",
    "timeout",
    "under_torchrun",
]

T = TypeVar("T")

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
"""Address of the lighthouse, `http://host:port`. Needed on rank 0 of each group."""
MANAGER_PORT = "TORCHFT_MANAGER_PORT"
"""Port of the manager server; 0 takes a free one."""
TIMEOUT_SEC = "TORCHFT_TIMEOUT_SEC"
"""Deadline of a collective, a transfer of state; a vote gets half as much again."""
QUORUM_TIMEOUT_SEC = "TORCHFT_QUORUM_TIMEOUT_SEC"
"""Deadline of a quorum."""
CONNECT_TIMEOUT_SEC = "TORCHFT_CONNECT_TIMEOUT_SEC"
"""Deadline of each connection to the lighthouse, a manager or the store."""
GLOO_SOCKET_IFNAME = "GLOO_SOCKET_IFNAME"
"""Network interface for gloo, such as `eth0`; unset: that of the host's own name. Torch's."""
CONGESTION = "TORCHFT_CONGESTION"
"""TCP congestion control of averages and heals, such as `bbr`; unset: the system's."""
LIGHTHOUSE_TIMEOUT_SEC = "TORCHFT_LIGHTHOUSE_TIMEOUT_SEC"
"""How long groups wait for a lighthouse that went away, before they give up."""
QUORUM_RETRIES = "TORCHFT_QUORUM_RETRIES"
"""How often a failed quorum request is sent again before its deadline."""
STEP_RECORDS = "TORCHFT_STEP_RECORDS"
"""File that gets one JSON line for each step of this rank."""
JOB_ID = "JOB_ID"
"""Name of the job, in structured log events."""
USE_BUCKETIZATION = "TORCHFT_USE_BUCKETIZATION"
"""`True` makes DiLoCo send its pseudo-gradient in buckets."""

DILOCO_SERVER = "DILOCO_SERVER"
"""`host:port` of the parameter server; unset: a worker does nothing."""
DILOCO_WORKER_ID = "DILOCO_WORKER_ID"
"""The worker's id."""
DILOCO_SYNC_EVERY = "DILOCO_SYNC_EVERY"
"""Inner steps between two submissions."""
DILOCO_NUM_FRAGMENTS = "DILOCO_NUM_FRAGMENTS"
"""Parts of the model that are submitted in turn."""
DILOCO_BF16_COMM = "DILOCO_BF16_COMM"
"""0: numbers travel as fp32; 1, the default: as bf16."""
DILOCO_CODEC = "DILOCO_CODEC"
"""How numbers travel; wins over `DILOCO_BF16_COMM`."""
DILOCO_DYLU = "DILOCO_DYLU"
"""1: take the number of steps that the server recommends."""
DILOCO_HEARTBEAT_INTERVAL = "DILOCO_HEARTBEAT_INTERVAL"
"""Seconds between two heartbeats, at most."""
DILOCO_AUTH_TOKEN = "DILOCO_AUTH_TOKEN"
"""The worker's token."""
DILOCO_AUTH_TOKEN_FILE = "DILOCO_AUTH_TOKEN_FILE"
"""A file that holds it."""
DILOCO_TLS_CA = "DILOCO_TLS_CA"
"""Certificates to trust, in PEM."""

OVERRIDING = (
    TIMEOUT_SEC,
    QUORUM_TIMEOUT_SEC,
    CONNECT_TIMEOUT_SEC,
    LIGHTHOUSE_TIMEOUT_SEC,
    QUORUM_RETRIES,
    USE_BUCKETIZATION,
)
"""Variables that win over the argument; of all others the argument wins."""


def argument_first(argument: T | None, name: str, read: Callable[[str], T | None]) -> T | None:
    """The argument where it is given, else what `read` reads of the variable, which may be None."""
    return read(name) if argument is None else argument


def text(name: str, default: str | None = None) -> str | None:
    """The variable as it stands, or `default` when it is unset or empty."""
    return os.environ.get(name) or default


def required(name: str, why: str) -> str:
    """The variable, which must be set; `why` says what it is for.

    Raises:
        MissingVariableError: it is unset or empty.
    """
    value = text(name)
    if value is None:
        raise MissingVariableError(f"the environment variable {name} is not set: {why}")
    return value


def integer(name: str, default: int, *, least: int | None = None) -> int:
    """The variable as an integer, `default` where it is unset.

    Raises:
        SettingsError: if the variable is not an integer, or below `least`.
    """
    value = text(name)
    if value is None:
        return default
    check_integer(name, integer_from(value), least=least)
    return int(value)


def integer_or_none(name: str) -> int | None:
    """The variable as an integer, None where it is unset.

    Raises:
        SettingsError: if the variable is not an integer.
    """
    return None if text(name) is None else integer(name, 0)


def number_or_none(name: str) -> float | None:
    """The variable as a number, None where it is unset.

    Raises:
        SettingsError: if the variable is not a finite number.
    """
    value = text(name)
    if value is None:
        return None
    check_number(name, number_from(value))
    return float(value)


def boolean_or_none(name: str) -> bool | None:
    """The variable as True (1, true, yes) or False (0, false, no), None where it is unset.

    Raises:
        SettingsError: if the variable is anything else.
    """
    value = text(name)
    return None if value is None else boolean_of(name, value)


def path_or_none(name: str) -> Path | None:
    """The variable as the path of a file, None where it is unset."""
    value = text(name)
    return None if value is None else Path(value)


def timeout(name: str, argument: timedelta) -> timedelta:
    """The variable as a timeout in whole seconds where it is set, else the argument.

    Raises:
        SettingsError: if the variable is not an integer, or below 1.
    """
    return argument if text(name) is None else timedelta(seconds=integer(name, 0, least=1))


def for_child(**changes: str | None) -> dict[str, str]:
    """This process's whole environment with changes, for a child; None takes a variable out."""
    environment = {**os.environ, **changes}
    return {name: value for name, value in environment.items() if value is not None}


def agent_serves_no_store() -> bool:
    """Whether a torchrun agent says that nobody listens at MASTER_ADDR:MASTER_PORT."""
    return text("TORCHELASTIC_USE_AGENT_STORE") == "False"


def under_torchrun() -> bool:
    """Whether a torchrun agent started this process."""
    return text("TORCHELASTIC_RUN_ID") is not None


def get_timeout(timeout_sec_env: str | None, default_timeout_sec: timedelta) -> timedelta:
    """`timeout_sec_env`, whole seconds, when it is given; else the default."""
    if timeout_sec_env is None:
        return default_timeout_sec
    return timedelta(seconds=int(timeout_sec_env))


@contextmanager
def set_during(name: str, value: str) -> Iterator[None]:
    """Set a variable for what runs in here, such as a constructor of torch's that reads it. One
    that is set already stays as it is."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
