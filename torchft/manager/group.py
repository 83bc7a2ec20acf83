"""The replica group that this process is a rank of: its name, its manager server, its client.

Rank 0 starts the manager server and writes its address and the group's full replica id into the
group's TCPStore; every rank reads them there and connects.
"""

from __future__ import annotations

import logging
import socket
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from torchft import settings
from torchft.coordination import ManagerClient, ManagerServer
from torchft.errors import TorchftError, UnreachableError
from torchft.process_group.attempt import Attempt, Deadline
from torchft.timeouts import inside_group

__all__ = ["MANAGER_ADDR_KEY", "REPLICA_ID_KEY", "ReplicaGroup"]

_log = logging.getLogger("torchft.manager.group")

_LAST_WORDS = timedelta(seconds=2)

MANAGER_ADDR_KEY = "manager_addr"
"""Key of the manager server's address in the group's store."""
REPLICA_ID_KEY = "replica_id"
"""Key of the full replica id in the group's store."""


@dataclass(frozen=True)
class ReplicaGroup:
    """One rank's view of its group."""

    rank: int
    world_size: int
    name: str
    """As the user gave it; empty when not given."""
    replica_id: str
    """The name and a suffix that is fresh for each start, so that a restart is a new member."""
    client: ManagerClient
    server: ManagerServer | None
    """On rank 0 only."""
    store: Store
    """Where its ranks meet. Kept, since this process may be the one that serves it."""

    @classmethod
    def join(
        cls,
        *,
        name: str,
        rank: int | None,
        world_size: int | None,
        store_addr: str | None,
        store_port: int | None,
        lighthouse_addr: str | None,
        hostname: str | None,
        port: int | None,
        heartbeat_interval: timedelta,
        connect_timeout: timedelta,
        quorum_retries: int,
    ) -> ReplicaGroup:
        """Meet the other ranks of this group. What is not given comes from torchrun's variables.

        Raises:
            MissingVariableError: a variable is neither given nor set.
            TimeoutError: the store or the lighthouse cannot be reached; UnreachableError is one.
        """
        rank = _given_or_variable(rank, "RANK")
        world_size = _given_or_variable(world_size, "WORLD_SIZE")
        addr = store_addr or settings.required("MASTER_ADDR", "pass store_addr, or use torchrun")
        number = _given_or_variable(store_port, "MASTER_PORT", "store_port")
        serves = rank == 0 and store_addr is None and settings.agent_serves_no_store()
        store = _store(addr, number, connect_timeout, serves=serves)
        server = None
        with ExitStack() as undo:
            if rank == 0:
                port = settings.argument_first(
                    port, settings.MANAGER_PORT, settings.integer_or_none
                )
                suffix = str(uuid.uuid4())
                replica_id = f"{name}:{suffix}" if name else suffix
                server = ManagerServer(
                    replica_id=replica_id,
                    lighthouse_addr=lighthouse_addr
                    or settings.required(settings.LIGHTHOUSE, "the lighthouse, http://host:port"),
                    hostname=hostname or socket.gethostname(),
                    bind=f"[::]:{port or 0}",
                    store_addr=f"{addr}:{number}",
                    world_size=world_size,
                    heartbeat_interval=heartbeat_interval,
                    connect_timeout=connect_timeout,
                    quorum_retries=quorum_retries,
                )
                undo.callback(server.shutdown)
                store.set(MANAGER_ADDR_KEY, server.address())
                store.set(REPLICA_ID_KEY, replica_id)
            address = store.get(MANAGER_ADDR_KEY).decode()
            joined = cls(
                rank=rank,
                world_size=world_size,
                name=name,
                replica_id=store.get(REPLICA_ID_KEY).decode(),
                client=ManagerClient(address, connect_timeout=connect_timeout),
                server=server,
                store=store,
            )
            undo.pop_all()  # it stands: nothing is taken back
            return joined

    def end(self, why: str) -> None:
        """This rank cannot go on: the group's other ranks are told `why`, and need not wait."""
        try:
            self.client._end_group(self.rank, why, timeout=_LAST_WORDS)
        except (TorchftError, TimeoutError) as error:
            _log.debug("the group's other ranks could not be told: %s", error)

    def leave(self) -> None:
        """Stop the manager server, when it is here: whoever waits for a quorum is freed."""
        if self.server is not None:
            self.server.shutdown()


def _store(addr: str, port: int, timeout: timedelta, *, serves: bool = False) -> Store:
    """The group's store. On a thread of its own: a wait inside torch hears no signal.

    `serves`: nobody else does, unless something in this process already has, as
    `init_process_group` does on rank 0.
    """
    where = f"the group's store at {addr}:{port} (MASTER_ADDR, MASTER_PORT)"

    def connect(attempt: Attempt[Store]) -> Store:
        attempt.stage = "an answer"
        if serves:
            with suppress(RuntimeError):  # it is served already, also for others of this process
                return TCPStore(
                    addr,
                    port,
                    is_master=True,
                    wait_for_workers=False,
                    timeout=timeout,
                    multi_tenant=True,
                )
        return TCPStore(addr, port, is_master=False, wait_for_workers=False, timeout=timeout)

    try:
        store = Attempt(connect).wait(Deadline.after(timeout))
        # The others wait here while rank 0 may wait for the lighthouse: longer than it does.
        store.set_timeout(inside_group(timeout))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UnreachableError(
            f"{where} cannot be reached: is torchrun running there? {reason}"
        ) from error
    # The agent's store outlives its workers: a restarted group must not read the old address.
    restarts = settings.integer("TORCHELASTIC_RESTART_COUNT", 0)
    return PrefixStore(f"restart_{restarts}", store) if restarts else store


def _given_or_variable(given: int | None, variable: str, argument: str | None = None) -> int:
    if given is not None:
        return given
    why = f"pass {argument or variable.lower()}, or start with torchrun"
    settings.required(variable, why)
    return settings.integer(variable, 0)
