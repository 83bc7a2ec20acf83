"""The Rust part of torchft: servers that coordinate replica groups, and their clients.

Deadlines are `timedelta`s. A deadline that passes raises `TimeoutError`, which says who was waited
for and why; other errors are classes of `torchft.errors`, all of them `RuntimeError`s.
"""

from datetime import timedelta
from typing import Any

class Timestamp:
    """A moment, since 1970."""

    @property
    def seconds(self) -> int: ...
    @property
    def nanos(self) -> int: ...

class QuorumMember:
    """One member of a quorum, as it asked."""

    @property
    def replica_id(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def store_address(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def shrink_only(self) -> bool: ...
    @property
    def commit_failures(self) -> int: ...
    @property
    def data(self) -> dict[str, Any] | None: ...

class Quorum:
    """The replica groups that take part in a step."""

    @property
    def quorum_id(self) -> int: ...
    @property
    def participants(self) -> list[QuorumMember]: ...
    @property
    def created(self) -> Timestamp: ...

class QuorumResult:
    """What one rank is told of a quorum."""

    quorum_id: int
    replica_rank: int
    replica_world_size: int
    recover_src_manager_address: str
    recover_src_replica_rank: int | None
    recover_dst_replica_ranks: list[int]
    store_address: str
    max_step: int
    max_replica_rank: int | None
    max_world_size: int
    heal: bool
    commit_failures: int
    replica_ids: list[str]
    reconfigure_handles: list[str]
    recovering_replica_ranks: list[int]
    fresh_replica_ranks: list[int]
    settling_replica_ranks: list[int]
    world_sizes: list[int]

    def __init__(self) -> None: ...

class LighthouseServer:
    """The lighthouse, inside this process."""

    def __init__(
        self,
        bind: str,
        min_replicas: int,
        join_timeout_ms: int = 100,
        quorum_tick_ms: int = 100,
        heartbeat_timeout_ms: int = 5000,
    ) -> None: ...
    def address(self) -> str: ...
    def shutdown(self) -> None: ...

class LighthouseClient:
    """A client of a lighthouse."""

    def __init__(self, addr: str, connect_timeout: timedelta) -> None: ...
    def quorum(
        self,
        replica_id: str,
        timeout: timedelta,
        address: str = "",
        store_address: str = "",
        step: int = 0,
        world_size: int = 0,
        shrink_only: bool = False,
        data: dict[str, Any] | None = None,
    ) -> Quorum: ...
    def heartbeat(self, replica_id: str, timeout: timedelta = ...) -> None: ...

class ManagerServer:
    """The manager server of a replica group, inside the process of its rank 0."""

    def __init__(
        self,
        replica_id: str,
        lighthouse_addr: str,
        hostname: str,
        bind: str,
        store_addr: str,
        world_size: int,
        heartbeat_interval: timedelta,
        connect_timeout: timedelta,
        quorum_retries: int,
    ) -> None: ...
    def address(self) -> str: ...
    def shutdown(self) -> None: ...

class ManagerClient:
    """One rank's client of a manager server."""

    def __init__(self, addr: str, connect_timeout: timedelta) -> None: ...
    def _quorum(
        self,
        group_rank: int,
        step: int,
        checkpoint_metadata: str,
        shrink_only: bool,
        init_sync: bool,
        commit_failures: int,
        timeout: timedelta,
        reconfigure_handle: str = "",
        settling: bool = False,
    ) -> QuorumResult: ...
    def _checkpoint_metadata(self, rank: int, timeout: timedelta) -> str: ...
    def should_commit(
        self, group_rank: int, step: int, should_commit: bool, timeout: timedelta
    ) -> bool: ...
    def _end_group(self, group_rank: int, why: str, timeout: timedelta) -> None: ...

def lighthouse_main(argv: list[str] | None = None) -> int: ...
def watch_parent(poll_ms: int = 250) -> None: ...
