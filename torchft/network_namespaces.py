"""Hosts behind slow links, on this machine: a network namespace each, joined through a centre.

    with Network() as network:
        home = network.host(Link(mbit_s=10))
        home.enter()                      # in a process of its own: it lives there from now on

    host ── modem ── centre ── modem ── host       one namespace each; all links are shaped here:
             up ▲      ▼ down                      packets wait in the modem and at the provider

The queue of a link is not in the host: there TCP would see it and keep it short, which it cannot
with a modem. A queue of 250 ms is a usual modem's, one of seconds an old one's.

A namespace here has no name. It is held by a descriptor of the process that made it and by the
processes that live in it, and is gone when the last of them is, however that comes: nothing is left
behind by a kill. It takes Linux, root, and the commands `ip` and `tc` (Debian: iproute2).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torchft import settings
from torchft.errors import SettingsError

__all__ = ["Host", "Link", "Network", "Passed", "missing"]

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET; os.unshare and os.setns came with Python 3.12
_HERE = "/proc/thread-self/ns/net"
_INTERFACE = "eth0"
_PACKET = 1514
_LEAST_BURST = 16 * 1024
_BURST_S = 0.004
"""A bucket of tokens for one tick of a slow kernel clock; smaller ones do not reach the rate."""


@dataclass(frozen=True)
class Link:
    """What joins a host to the others, alike in both directions."""

    mbit_s: float
    """Of whole frames, headers included."""
    queue_ms: float = 250.0
    """So much of what is sent waits at most; what comes on top of that is dropped."""
    sorts: bool = False
    """Urgent packets overtake bulk, by their TOS, as in the queue that Linux has by default; else
    they wait behind it, as in most modems."""

    def __post_init__(self) -> None:
        if self.mbit_s <= 0 or self.queue_ms <= 0:
            raise SettingsError(f"{self}: give a rate and a queue above 0")

    @property
    def queue_bytes(self) -> int:
        """How many bytes may wait in the link's queue."""
        return round(self.mbit_s * 1e6 / 8 * self.queue_ms / 1e3)

    def shaping(self, interface: str) -> list[str]:
        """Lines for `tc`, for what leaves by `interface`."""
        burst = max(_LEAST_BURST, round(self.mbit_s * 1e6 / 8 * _BURST_S))
        rate = f"tbf rate {round(self.mbit_s * 1e6)}bit burst {burst}"
        lines = [
            f"qdisc add dev {interface} root handle 1: {rate} limit {burst + self.queue_bytes}"
        ]
        if self.sorts:
            lines.append(f"qdisc add dev {interface} parent 1:1 pfifo_fast")
        return lines


@dataclass(frozen=True)
class Passed:
    """What has gone through a queue or an interface so far."""

    bytes: int
    """With all headers."""
    dropped: int = 0
    """Packets that found the queue full."""


@dataclass(frozen=True)
class Host:
    """One namespace. Another process can be given it, as long as the network's own one lives."""

    address: str
    """IPv4, which all hosts of the network reach."""
    path: str
    """`/proc/…/fd/…`: what `setns` opens."""
    interface: str = _INTERFACE
    """What its traffic leaves by; the centre, which all links lead to, has only `lo`."""

    def enter(self) -> None:
        """Live here: this thread, those it starts, its children. Gloo takes the host's interface.

        Threads that run already stay where they are: enter before there are any.
        """
        _set_namespace(self.path)
        os.environ[settings.GLOO_SOCKET_IFNAME] = self.interface

    @contextmanager
    def inside(self) -> Iterator[None]:
        """This thread is here for the length of the block."""
        before = os.open(_HERE, os.O_RDONLY)
        try:
            _set_namespace(self.path)
            try:
                yield
            finally:
                _set_descriptor(before)
        finally:
            os.close(before)

    def sent(self) -> Passed:
        """What left by its interface, by the kernel's counter.

        It sees a burst of packets as one before the card has cut it, so that headers are missing;
        `Network.sent` has them.

        Raises:
            LookupError: the host has no such interface.
        """
        with self.inside():
            for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
                name, _, counts = line.partition(":")
                if name.strip() == self.interface:
                    return Passed(int(counts.split()[8]))
        raise LookupError(f"this host has no interface {self.interface!r}")


class Network:
    """Hosts that reach each other through a centre, which has no slow link: for a lighthouse.

    Raises:
        SettingsError: what `missing` says.
    """

    def __init__(self) -> None:
        if (why := missing()) is not None:
            raise SettingsError(f"no network of namespaces can be made here: {why}")
        self._undo = ExitStack()
        self._modems: dict[Host, tuple[Host, str]] = {}
        """By host: its modem, and the centre's interface to it."""
        self._shaped: set[Host] = set()
        try:
            self.centre = self._namespace("10.79.0.1", "lo")
            _ip(self.centre, f"address add {self.centre.address}/32 dev lo")
            _forward(self.centre)
        except BaseException:
            self._undo.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the namespaces: each is gone with the last process in it."""
        self._undo.close()

    def host(self, link: Link) -> Host:
        """One more, behind a link of its own."""
        number = len(self._modems) + 1
        lan, wan = f"10.77.{number}", f"10.78.{number}"
        host, modem = self._namespace(f"{lan}.2"), self._namespace(f"{lan}.1")
        port = f"link{number}"
        _join(host, _INTERFACE, modem, "lan")
        _join(modem, "wan", self.centre, port)
        _ip(
            host,
            f"address add {host.address}/24 dev {_INTERFACE}",
            f"link set {_INTERFACE} up",
        )
        _ip(
            modem,
            f"address add {modem.address}/24 dev lan",
            f"address add {wan}.2/24 dev wan",
            "link set lan up",
            "link set wan up",
        )
        _ip(
            self.centre,
            f"address add {wan}.1/24 dev {port}",
            f"link set {port} up",
            f"route add {lan}.0/24 via {wan}.2",
        )
        _ip(host, f"route add default via {modem.address}")
        _ip(modem, f"route add default via {wan}.1")
        _forward(modem)
        self._modems[host] = modem, port
        self.shape(host, link)
        return host

    def shape(self, host: Host, link: Link) -> None:
        """From now on `host` is behind this link; also while it is in use: what waits is lost."""
        modem, port = self._modems[host]
        for router, interface in ((modem, "wan"), (self.centre, port)):
            if host in self._shaped:
                _tc(router, [f"qdisc del dev {interface} root"])
            packets = max(1, link.queue_bytes // _PACKET)
            _ip(router, f"link set {interface} txqueuelen {packets}")
            _tc(router, link.shaping(interface))
        self._shaped.add(host)

    def sent(self, host: Host) -> Passed:
        """What left `host` over its link since that was shaped, with every packet's headers."""
        modem, _ = self._modems[host]
        with modem.inside():
            queues = json.loads(_run(["tc", "-s", "-j", "qdisc", "show", "dev", "wan"]))
        (link,) = (queue for queue in queues if queue.get("root"))
        return Passed(link["bytes"], link["drops"])

    def _namespace(self, address: str, interface: str = _INTERFACE) -> Host:
        descriptor = _new_namespace()
        self._undo.callback(os.close, descriptor)
        made = Host(address, f"/proc/{os.getpid()}/fd/{descriptor}", interface)
        _ip(made, "link set lo up")
        return made


def missing() -> str | None:
    """Why there can be no `Network` here; None: there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"there is no command {command!r} (Debian: apt-get install iproute2)"
    try:
        os.close(_new_namespace())
    except OSError as error:
        return f"this process may not make a network namespace ({error.strerror}): be root"
    return None


def _join(one: Host, interface: str, other: Host, its_interface: str) -> None:
    _ip(one, f"link add {interface} type veth peer name {its_interface} netns {other.path}")


def _forward(router: Host) -> None:
    with router.inside():
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _ip(host: Host, *lines: str) -> None:
    with host.inside():
        _run(["ip", "-batch", "-"], "\n".join(lines))


def _tc(host: Host, lines: list[str]) -> None:
    with host.inside():
        _run(["tc", "-batch", "-"], "\n".join(lines))


def _run(command: list[str], lines: str | None = None) -> str:
    done = subprocess.run(command, input=lines, capture_output=True, text=True)
    if done.returncode != 0:
        raise SettingsError(f"`{' '.join(command)}` failed: {done.stderr.strip()}\n{lines or ''}")
    return done.stdout


def _new_namespace() -> int:
    """A descriptor that holds a new, empty namespace; this thread stays where it is."""
    before = os.open(_HERE, os.O_RDONLY)
    try:
        _check(_libc().unshare(_NEW_NETWORK))
        try:
            return os.open(_HERE, os.O_RDONLY)
        finally:
            _set_descriptor(before)
    finally:
        os.close(before)


def _set_namespace(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _set_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _set_descriptor(descriptor: int) -> None:
    _check(_libc().setns(descriptor, _NEW_NETWORK))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(code: int) -> None:
    if code != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
