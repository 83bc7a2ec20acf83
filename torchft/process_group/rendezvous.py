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
from ipaddress import ip_address

from torch.distributed import Store

from torchft.arguments import check_integer
from torchft.errors import (
    CollectiveError,
    MeetingTimeoutError,
    MismatchError,
    SettingsError,
    SharedDeviceError,
)
from torchft.process_group.attempt import Deadline
from torchft.process_group.sockets import Address
from torchft.retry import pauses

__all__ = ["Member", "meet", "tidy"]

_LOOK_S = (0.0005, 0.02)
"""First and longest pause between two looks into the store."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Who somebody is to be in a process group."""

    rank: int
    world_size: int
    replica_id: str

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, least=0, below=self.world_size)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.replica_id})"


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of a process group, as it announces itself."""

    rank: int
    world_size: int
    replica_id: str
    host: str
    """Name of the machine, for people."""
    network: str
    """Equal for processes that share one loopback interface."""
    listen: Address | None
    """Where its gloo listens; None where a process cannot find out."""
    device: str | None = None
    """What no two members may share, such as the UUID of a GPU; None: they may."""

    def __str__(self) -> str:
        at = f" at {self.listen[0]}:{self.listen[1]}" if self.listen else ""
        return f"rank {self.rank} ({self.replica_id} on {self.host}{at})"

    @staticmethod
    def here(seat: Seat, listen: Address | None, device: str | None = None) -> Member:
        """This process as the member that takes `seat`."""
        host = socket.gethostname()
        return Member(seat.rank, seat.world_size, seat.replica_id, host, _network(), listen, device)

    @staticmethod
    def read(text: bytes | str) -> Member:
        """The member whose announcement in the store is `text`."""
        fields = json.loads(text)
        listen = fields.pop("listen")
        return Member(**fields, listen=(str(listen[0]), int(listen[1])) if listen else None)


def meet(
    store: Store, me: Member, store_addr: str, deadline: Deadline, stopped: Callable[[], bool]
) -> tuple[Member, ...]:
    """Announce `me` and wait for everybody; all members in the order of their ranks.

    Raises:
        MeetingTimeoutError: somebody is missing at the deadline; the message says which ranks.
        MismatchError: a member was told of another number of members.
        SettingsError: a member listens where the others cannot reach it.
        SharedDeviceError: a member of a lower rank is on the same device.
        CollectiveError: the store is gone, `stopped` says so, or other members share a device.
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
    _check_devices(members, me)
    return members


def _key(rank: int) -> str:
    return f"member/{rank}"


def _wait_for_all(
    store: Store, me: Member, store_addr: str, deadline: Deadline, stopped: Callable[[], bool]
) -> None:
    """Look again and again: a blocking wait in the store hears neither Ctrl-C nor an abort."""
    missing = [rank for rank in range(me.world_size) if rank != me.rank]
    waits = pauses(*_LOOK_S)
    while not store.check([_key(rank) for rank in missing]):
        missing = [rank for rank in missing if not store.check([_key(rank)])]
        if stopped():
            raise CollectiveError(f"{store_addr}: abandoned while waiting for ranks {missing}")
        if deadline.passed():
            raise MeetingTimeoutError(
                f"rank {me.rank} ({me.replica_id}) waited {deadline} at the store {store_addr} for "
                f"{_ranks(missing)} of {me.world_size}, which did not come: its process is gone "
                "or stuck, or was told of another store"
            )
        time.sleep(next(waits))


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


def _check_devices(members: Sequence[Member], me: Member) -> None:
    """Of those on one device the lowest rank may stay, so that one start too many ends no other
    group."""
    first: dict[str, Member] = {}
    for member in members:
        if member.device is None:
            continue
        other = first.setdefault(member.device, member)
        if other is member:
            continue
        why = (
            f"{member} is on the same device as {other} ({member.device}), which this kind of "
            "process group cannot serve: give each replica group a device of its own "
            "(CUDA_VISIBLE_DEVICES, torch.cuda.set_device), or use ProcessGroupGloo"
        )
        raise SharedDeviceError(why) if member.rank == me.rank else CollectiveError(why)


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
