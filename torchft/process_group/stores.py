"""Clients of the stores at which groups meet: one connection for each store, used again.

Connecting is the slow part: torch looks up the names of both ends, and each time that a name server
does not answer costs seconds, for the server too. So a client is kept while its store lives. Each
rank keeps its own: while one waits in a client, no other can use it, not even to write the key that
is waited for.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import OrderedDict
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from torchft.errors import CollectiveError, MeetingTimeoutError, SettingsError, TorchftError
from torchft.process_group.attempt import Attempt, Deadline

__all__ = ["StoreClients", "create_store_client"]

_KEPT = 8

_Key = tuple[int, str, int, timedelta]
"""Process (a forked child must leave its parent's connection alone), host, port, timeout."""


def create_store_client(store_addr: str, timeout: timedelta) -> Store:
    """A client of the store at `host:port/prefix`, under that prefix, on a connection of its own.

    Raises:
        SettingsError: the address has another form.
        CollectiveError: its host has no address or refuses the connection.
        MeetingTimeoutError: no answer within `timeout`.
    """
    return StoreClients().client(store_addr, timeout)


class StoreClients:
    """The connections that one rank keeps."""

    def __init__(self) -> None:
        self._clients: OrderedDict[_Key, TCPStore] = OrderedDict()
        self._changing = threading.Lock()

    def client(self, store_addr: str, timeout: timedelta) -> Store:
        """A client of the store, on the earlier connection if the store still answers on it.

        Raises:
            SettingsError: the address has another form.
            CollectiveError: the host has no address, or the store does not answer.
            MeetingTimeoutError: no answer within `timeout`.
        """
        host, port, prefix = _parse(store_addr)
        deadline = Deadline.after(timeout)
        key = (os.getpid(), host, port, timeout)
        attempt = Attempt(lambda _: self._kept(key) or self._connect(key, store_addr, deadline))
        attempt.stage = f"the store at {store_addr}: its process is stuck or cannot be reached"
        try:
            return PrefixStore(prefix, attempt.wait(deadline))
        except MeetingTimeoutError:
            self.forget(store_addr)
            raise
        except TorchftError:
            raise
        except RuntimeError as error:
            raise CollectiveError(f"the store at {store_addr} does not answer: {error}") from error

    def forget(self, store_addr: str) -> None:
        """Connect anew next time: an operation on this store failed or hangs."""
        _, port, _ = _parse(store_addr)
        with self._changing:
            for key in [key for key in self._clients if key[2] == port]:
                del self._clients[key]

    def close(self) -> None:
        """Let go of all connections; each ends when nobody else uses it."""
        with self._changing:
            self._clients.clear()

    def _kept(self, key: _Key) -> TCPStore | None:
        with self._changing:
            client = self._clients.pop(key, None)
        if client is None:
            return None
        try:
            client.check(["alive"])
        except RuntimeError:
            return None
        return self._keep(key, client)

    def _connect(self, key: _Key, store_addr: str, deadline: Deadline) -> TCPStore:
        _, host, port, timeout = key
        numeric = _knock(store_addr, host, port, deadline)
        client = TCPStore(
            host_name=numeric, port=port, is_master=False, timeout=timeout, wait_for_workers=False
        )
        return self._keep(key, client)

    def _keep(self, key: _Key, client: TCPStore) -> TCPStore:
        with self._changing:
            self._clients[key] = client
            while len(self._clients) > _KEPT:
                self._clients.popitem(last=False)
        return client


def _parse(store_addr: str) -> tuple[str, int, str]:
    place, slash, prefix = store_addr.partition("/")
    host, colon, port = place.rpartition(":")
    if not (slash and colon and host and port.isdigit()):
        raise SettingsError(f"store address {store_addr!r} is not of the form host:port/prefix")
    return host.strip("[]"), int(port), prefix


def _knock(store_addr: str, host: str, port: int, deadline: Deadline) -> str:
    """See that somebody is there: TCPStore takes three times its timeout to say that nobody is.

    Returns the numeric address, which TCPStore then need not look up.
    """
    try:
        with socket.create_connection((host, port), deadline.left().total_seconds()) as knock:
            return str(knock.getpeername()[0])
    except socket.gaierror as error:
        raise CollectiveError(
            f"the store at {store_addr} cannot be found: {error}. Each host must be able to "
            f"resolve the name {host!r}"
        ) from error
    except TimeoutError as error:
        raise MeetingTimeoutError(
            f"the store at {store_addr} did not answer within {deadline}"
        ) from error
    except OSError as error:
        raise CollectiveError(
            f"the store at {store_addr} cannot be reached ({error}): the process that serves it "
            "is gone"
        ) from error
