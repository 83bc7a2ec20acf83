"""Gloo among the replica groups: a new generation in milliseconds, an abandoned one gone as fast.

Making one: open a network device and see where it listens, meet the others in the store, let gloo
connect to all of them, note which sockets that made and mark them as bulk. Gloo tries a dead peer
five times for its whole timeout each, so while it connects it gets a fifth of what is left.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo as GlooBackend
from torch.distributed import Store

from torchft import settings
from torchft.errors import CollectiveError, SettingsError
from torchft.process_group import bulk, rendezvous, sockets
from torchft.process_group.attempt import Attempt, Deadline
from torchft.process_group.control import Connections
from torchft.process_group.generation import Generation, set_backend_timeout
from torchft.process_group.rendezvous import Member, Seat
from torchft.process_group.wrapper import ProcessGroupWrapper

__all__ = ["ProcessGroupGloo"]

_log = logging.getLogger(__name__)

_CONNECT_TRIES = 5
_gloo: Any = GlooBackend  # torch's stubs do not show its options


class ProcessGroupGloo(ProcessGroupWrapper):
    """Collectives over TCP, for tensors on the CPU (and slowly for others).

    `timeout` is the deadline of each configure and each operation.
    """

    def __init__(self, timeout: timedelta = timedelta(seconds=60)) -> None:
        if timeout <= timedelta(0):
            raise SettingsError(f"timeout={timeout} is no timeout: give one above 0")
        bulk.check()
        super().__init__(timeout)

    def getBackendName(self) -> str:
        """The name of its backend, `torchft-gloo`."""
        return "torchft-gloo"

    def _make(
        self, attempt: Attempt[Generation], deadline: Deadline, store_addr: str, seat: Seat
    ) -> Generation:
        attempt.stage = f"the store at {store_addr}"
        store = self._stores.client(store_addr, self._timeout)
        try:
            device, listen = sockets.listening(_open_device)
            me = Member.here(seat, listen)
            members = rendezvous.meet(store, me, store_addr, deadline, attempt.stopped.is_set)
            attempt.stage = f"gloo to connect {_others(members, me)}"
            backend = _connect(store, device, members, me, store_addr, deadline)
            attempt.stage = f"the store at {store_addr}"
            rendezvous.tidy(store, seat.world_size)
        except BaseException:
            self._stores.forget(store_addr)
            raise
        set_backend_timeout(backend, self._timeout)
        own = _own_sockets(members, me)
        sockets.each(own, bulk.as_bulk)
        return Generation(
            backend,
            name=store_addr,
            rank=seat.rank,
            members=members,
            store=store,
            control=Connections(own),
            timeout=self._timeout,
        )


def _open_device() -> GlooBackend.Device:
    interface = settings.text(settings.GLOO_SOCKET_IFNAME)
    if interface is not None and "," in interface:
        raise SettingsError(f"{settings.GLOO_SOCKET_IFNAME}={interface!r}: name one interface")
    try:
        if interface is not None:
            return GlooBackend.create_device(interface=interface)
        return GlooBackend.create_default_device()
    except RuntimeError as error:
        if not sockets.descriptors_left():
            raise sockets.no_descriptors() from error
        named = f" on {interface!r}" if interface else ""
        raise SettingsError(
            f"gloo cannot open a network device{named}: {error}. Set GLOO_SOCKET_IFNAME to a "
            "network interface of this host (`ip -br addr` lists them), or unset it and let the "
            "host's own name resolve to an address of it"
        ) from error


def _connect(
    store: Store,
    device: GlooBackend.Device,
    members: tuple[Member, ...],
    me: Member,
    store_addr: str,
    deadline: Deadline,
) -> GlooBackend:
    options = _gloo._Options()
    options._devices = [device]
    options._timeout = deadline.timeout
    if hasattr(GlooBackend, "set_timeout"):  # it gets the whole one afterwards
        options._timeout = deadline.left() / _CONNECT_TRIES
    try:
        return GlooBackend(store, me.rank, me.world_size, options)
    except RuntimeError as error:
        raise CollectiveError(
            f"{me} could not connect to all of {_others(members, me)}, which had met it at "
            f"{store_addr}: {error}. One of them died meanwhile, or a firewall is between them"
        ) from error


def _others(members: tuple[Member, ...], me: Member) -> str:
    return ", ".join(str(member) for member in members if member.rank != me.rank)


def _own_sockets(members: tuple[Member, ...], me: Member) -> tuple[sockets.OwnSocket, ...]:
    if me.listen is None:
        return ()
    peers = {member.listen for member in members if member.listen and member.rank != me.rank}
    own = sockets.connected(me.listen, peers)
    if len(own) != len(members) - 1:
        # Peers that ended already, or gloo told to connect lazily.
        _log.info(
            "rank %d (%s) recognises %d of its %d connections: abandoning a collective may wait "
            "for its deadline",
            me.rank,
            me.replica_id,
            len(own),
            len(members) - 1,
        )
    return own
