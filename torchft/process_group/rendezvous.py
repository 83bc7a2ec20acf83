"""How the members of a new process group find each other: through a store, before gloo connects.

Each member says under the group's prefix who it is and where it listens, and waits until all have.
So whoever is missing is known by name at the deadline, members that cannot reach each other are
told why before anything hangs, and a group knows its own connections by their addresses. Once all
stand, the last one deletes what was written: a store serves thousands of groups in its life.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from ipaddress import ip_address

from torch.distributed import PrefixStore, Store, TCPStore

from torchft.errors import CollectiveError, MismatchError, SettingsError
from torchft.process_group.sockets import Address

__all__ = ["Deadline", "Member", "create_store_client", "meet", "tidy"]

_LOOK_S = (0.0005, 0.02)
"""First and longest pause between two looks into the store."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment by which something must have happened."""

    timeout: timedelta
    at: float
    """Seconds of `time.monotonic()`."""

    @staticmethod
    def after(timeout: timedelta) -> Deadline:
        return Deadline(timeout, time.monotonic() + timeout.total_seconds())

    def left(self) -> timedelta:
        """Never negative, and never zero, which some of torch's calls take for "no deadline"."""
        return timedelta(seconds=max(0.001, self.at - time.monotonic()))

    def passed(self) -> bool:
        return time.monotonic() >= self.at


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of a process group, as it announces itself."""

    rank: int
    replica_id: str
    world_size: int
    host: str
    """Name of the machine, for people."""
    network: str
    """Equal for processes that share one loopback interface."""
    listen: Address | None
    """Where its gloo listens; None where a process cannot find out."""

    def __str__(self) -> str:
        at = f" at {self.listen[0]}:{self.listen[1]}" if self.listen else ""
        return f"rank {self.rank} ({self.replica_id} on {self.host}{at})"

    @staticmethod
    def here(rank: int, replica_id: str, world_size: int, listen: Address | None) -> Member:
        return Member(rank, replica_id, world_size, socket.gethostname(), _network(), listen)

    @staticmethod
    def read(text: bytes | str) -> Member:
        fields = json.loads(text)
        listen = fields.pop("listen")
        return Member(**fields, listen=(str(listen[0]), int(listen[1])) if listen else None)


def create_store_client(store_addr: str, timeout: timedelta) -> Store:
    """A client of the store at `host:port/prefix`, with that prefix.

    Raises:
        SettingsError: the address has another form.
        CollectiveError: its host has no address or refuses the connection.
        TimeoutError: no answer within `timeout`.
    """
    host, port, prefix = _parse(store_addr)
    deadline = Deadline.after(timeout)
    _knock(store_addr, host, port, deadline)
    try:
        # Not the time that is left: this timeout also holds for each later operation.
        client = TCPStore(
            host_name=host, port=port, is_master=False, timeout=timeout, wait_for_workers=False
        )
    except RuntimeError as error:
        raise CollectiveError(f"the store at {store_addr} does not answer: {error}") from error
    return PrefixStore(prefix, client)


def _parse(store_addr: str) -> tuple[str, int, str]:
    place, slash, prefix = store_addr.partition("/")
    host, colon, port = place.rpartition(":")
    if not (slash and colon and host and port.isdigit()):
        raise SettingsError(f"store address {store_addr!r} is not of the form host:port/prefix")
    return host.strip("[]"), int(port), prefix


def _knock(store_addr: str, host: str, port: int, deadline: Deadline) -> None:
    """See that somebody is there: TCPStore takes three times its timeout to say that nobody is."""
    try:
        socket.create_connection((host, port), deadline.left().total_seconds()).close()
    except socket.gaierror as error:
        raise CollectiveError(
            f"the store at {store_addr} cannot be found: {error}. Each host must be able to "
            f"resolve the name {host!r}"
        ) from error
    except TimeoutError as error:
        raise TimeoutError(
            f"the store at {store_addr} did not answer within "
            f"{deadline.timeout.total_seconds():g} s"
        ) from error
    except OSError as error:
        raise CollectiveError(
            f"the store at {store_addr} cannot be reached ({error}): the process that serves it "
            "is gone"
        ) from error


def meet(
    store: Store, me: Member, store_addr: str, deadline: Deadline, stopped: Callable[[], bool]
) -> tuple[Member, ...]:
    """Announce `me` and wait for everybody; all members in the order of their ranks.

    Raises:
        TimeoutError: somebody is still missing at the deadline; the message says which ranks.
        MismatchError: a member was told of another number of members.
        SettingsError: a member listens where the others cannot reach it.
        CollectiveError: the store is gone, or `stopped` says so.
    """
    try:
        store.set(_key(me.rank), json.dumps(asdict(me)))
        _wait_for_all(store, me, store_addr, deadline, stopped)
        keys = [_key(rank) for rank in range(me.world_size)]
        members = tuple(Member.read(text) for text in store.multi_get(keys))
    except CollectiveError:
        raise
    except RuntimeError as error:  # torch.distributed.Dist…Error
        raise CollectiveError(f"the store at {store_addr} failed: {error}") from error
    _check(members, me, store_addr)
    return members


def _key(rank: int) -> str:
    return f"member/{rank}"


def _wait_for_all(
    store: Store, me: Member, store_addr: str, deadline: Deadline, stopped: Callable[[], bool]
) -> None:
    """Look again and again: a blocking wait in the store hears neither Ctrl-C nor an abort."""
    missing = [rank for rank in range(me.world_size) if rank != me.rank]
    pause, longest = _LOOK_S
    while not store.check([_key(rank) for rank in missing]):
        missing = [rank for rank in missing if not store.check([_key(rank)])]
        if stopped():
            raise CollectiveError(f"{store_addr}: abandoned while waiting for ranks {missing}")
        if deadline.passed():
            raise TimeoutError(
                f"rank {me.rank} ({me.replica_id}) waited {deadline.timeout.total_seconds():g} s "
                f"at the store {store_addr} for {_ranks(missing)} of {me.world_size}, which did "
                "not come: its process is gone or stuck, or was told of another store"
            )
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


def _check(members: Sequence[Member], me: Member, store_addr: str) -> None:
    for member in members:
        if member.world_size != me.world_size:
            raise MismatchError(
                f"{member} was told of {member.world_size} members at {store_addr}, "
                f"rank {me.rank} ({me.replica_id}) of {me.world_size}"
            )
    apart = len({member.network for member in members}) > 1
    for member in members:
        if apart and member.listen is not None and ip_address(member.listen[0]).is_loopback:
            raise SettingsError(
                f"{member} listens for gloo on a loopback address, which the other hosts cannot "
                f"reach: on {member.host} set GLOO_SOCKET_IFNAME to the network interface to use "
                f"(`ip -br addr` lists them), or let its host name resolve to that address"
            )


def tidy(store: Store, world_size: int) -> None:
    """Say that this member stands; the last one to do so deletes the group's keys.

    Earlier nobody may: a member that stands has connected to all, but some of those it connected
    to may still be reading. What cannot be deleted is a few bytes in a store that will end.
    """
    with suppress(RuntimeError):
        if store.add("standing", 1) < world_size:
            return
        for rank in range(world_size):
            store.delete_key(_key(rank))
            store.delete_key(f"0/{rank}")  # gloo's own, under its context's number
        store.delete_key("standing")


def _network() -> str:
    """The kernel's name for this machine's boot and network namespace, or else the host's name."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()
