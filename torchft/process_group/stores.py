"""Clients of the stores at which groups meet: one connection for each store, used again.

Connecting is the slow part: torch looks up the names of both ends, and each time that a name server
does not answer costs seconds, for the server too. So a client is kept while its store lives.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import OrderedDict
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from torchft.errors import CollectiveError, SettingsError, TorchftError
from torchft.process_group.attempt import Attempt, Deadline

__all__ = ["create_store_client", "forget"]

_KEPT = 8

_Key = tuple[int, str, int, timedelta]
"""Process (a forked child must leave its parent's connection alone), host, port, timeout."""

_clients: OrderedDict[_Key, TCPStore] = OrderedDict()
_changing = threading.Lock()


def create_store_client(store_addr: str, timeout: timedelta) -> Store:
    """A client of the store at `host:port/prefix`, under that prefix.

    It may share its connection with other clients of the same store and timeout.

    Raises:
        SettingsError: the address has another form.
        CollectiveError: its host has no address or refuses the connection.
        TimeoutError: no answer within `timeout`.
    """
    host, port, prefix = _parse(store_addr)
    deadline = Deadline.after(timeout)
    key = (os.getpid(), host, port, timeout)
    attempt = Attempt(lambda _: _kept(key) or _connect(key, store_addr, deadline))
    attempt.stage = f"the store at {store_addr}: its process is stuck or cannot be reached"
    try:
        return PrefixStore(prefix, attempt.wait(deadline))
    except TimeoutError:
        forget(store_addr)
        raise
    except TorchftError:
        raise
    except RuntimeError as error:
        raise CollectiveError(f"the store at {store_addr} does not answer: {error}") from error


def forget(store_addr: str) -> None:
    """Connect anew next time: an operation on this store failed or hangs."""
    _, port, _ = _parse(store_addr)
    with _changing:
        for key in [key for key in _clients if key[2] == port]:
            del _clients[key]


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
        raise TimeoutError(f"the store at {store_addr} did not answer within {deadline}") from error
    except OSError as error:
        raise CollectiveError(
            f"the store at {store_addr} cannot be reached ({error}): the process that serves it "
            "is gone"
        ) from error


def _kept(key: _Key) -> TCPStore | None:
    """The connection of before, if its store still answers."""
    with _changing:
        client = _clients.pop(key, None)
    if client is None:
        return None
    try:
        client.check(["alive"])
    except RuntimeError:
        return None
    return _keep(key, client)


def _connect(key: _Key, store_addr: str, deadline: Deadline) -> TCPStore:
    _, host, port, timeout = key
    numeric = _knock(store_addr, host, port, deadline)
    client = TCPStore(
        host_name=numeric, port=port, is_master=False, timeout=timeout, wait_for_workers=False
    )
    return _keep(key, client)


def _keep(key: _Key, client: TCPStore) -> TCPStore:
    with _changing:
        _clients[key] = client
        while len(_clients) > _KEPT:
            _clients.popitem(last=False)
    return client
