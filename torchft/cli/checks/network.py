"""Names, addresses and ports of this machine, as the servers and gloo will use them."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from torchft.cli.checks.check import Check

__all__ = ["gloo", "gloo_interface", "host_name", "ipv6", "look_ups", "ports"]

LIGHTHOUSE_PORT = 29510
"""Where `torchft_lighthouse` listens unless told otherwise."""

TORCHRUN_PORTS = (29500, 29600)
"""torchrun's own default, and the first of the examples."""

SLOW_S = 0.5
"""A look-up that takes longer is waiting for a name server that does not answer."""

LOOK_UPS = 5
"""A server that drops some questions is not always caught by the first."""

Resolve = Callable[[str], Sequence[str]]


def resolve(name: str) -> list[str]:
    """All addresses of a name, each once. Raises OSError when it has none."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def can_bind(address: str, port: int = 0) -> OSError | None:
    """None if a server can listen there, else why not."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            probe.listen(1)
    except OSError as error:
        return error
    return None


def host_name(name: str | None = None, *, resolve: Resolve = resolve) -> Check:
    """Other groups reach this one by the name of its machine."""
    name = name or socket.gethostname()
    fix = "add it to /etc/hosts or to the DNS, or pass Manager(hostname=…) an address"
    try:
        addresses = resolve(name)
    except OSError as error:
        return Check.fail("host name", f"{name} does not resolve ({error.strerror})", fix)
    listed = ", ".join(addresses)
    foreign = [address for address in addresses if can_bind(address) is not None]
    if foreign:
        found = f"{name} is {listed}, and {', '.join(foreign)} is no address of this machine"
        return Check.fail("host name", found, fix)
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        return Check.warn(
            "host name",
            f"{name} is {listed}: groups on this machine find each other, others do not find it",
            f"for several machines, {fix}",
        )
    return Check.ok("host name", f"{name} is {listed}")


def name_of_loopback() -> None:
    """What torch asks for each connection to a store: the name behind the address of the peer."""
    socket.getnameinfo(("::ffff:127.0.0.1", 0), 0)


def look_ups(ask: Callable[[], None] = name_of_loopback) -> Check:
    """A silent name server stalls every connection to a store; in seconds, the slowest of a few."""
    slowest_s = 0.0
    for _ in range(LOOK_UPS):
        began = time.monotonic()
        with suppress(OSError):  # that there is no name is an answer
            ask()
        slowest_s = max(slowest_s, time.monotonic() - began)
        if slowest_s > SLOW_S:
            return Check.warn(
                "name look-ups",
                f"the name behind an address took {slowest_s:.1f} s to look up, as torch does for "
                "each connection to a store",
                'set RES_OPTIONS="timeout:1 attempts:1", or name a DNS server that answers',
            )
    return Check.ok("name look-ups", f"the slowest of {LOOK_UPS} took {slowest_s * 1e3:.0f} ms")


def ipv6() -> Check:
    """The servers listen on [::], which serves IPv4 as well where both are there."""
    wildcard = can_bind("::")
    if wildcard is None:
        return Check.ok("ipv6", "servers can listen on [::], for IPv4 and IPv6")
    return Check.warn(
        "ipv6",
        f"nothing can listen on [::] ({wildcard.strerror})",
        f"start the lighthouse with --bind 0.0.0.0:{LIGHTHOUSE_PORT}",
    )


def ports(
    numbers: Sequence[int] = (LIGHTHOUSE_PORT, *TORCHRUN_PORTS),
    *,
    is_lighthouse: Callable[[int], bool],
) -> Check:
    """The ports that are used when none is named. A lighthouse that runs on its own is fine."""
    taken = [number for number in numbers if _is_taken(number)]
    ours = [n for n in taken if n == LIGHTHOUSE_PORT and is_lighthouse(n)]
    strange = [number for number in taken if number not in ours]
    if not strange:
        runs = "; a lighthouse listens on it" if ours else ""
        return Check.ok("ports", f"{', '.join(map(str, numbers))} are usable{runs}")
    return Check.warn(
        "ports",
        f"taken by another program: {', '.join(map(str, strange))}",
        "name free ones: torchft_lighthouse --bind [::]:PORT, torchrun --master_port=PORT",
    )


def _is_taken(port: int) -> bool:
    error = can_bind("0.0.0.0", port)
    return error is not None and error.errno == errno.EADDRINUSE


def gloo_interface(chosen: str | None, *, names: Sequence[str] | None = None) -> Check:
    """GLOO_SOCKET_IFNAME, `chosen`, names the interface that averages travel over."""
    names = [name for _, name in socket.if_nameindex()] if names is None else names
    if chosen is None:
        return Check.ok(
            "gloo interface",
            "that of the host name, else loopback (GLOO_SOCKET_IFNAME is not set)",
        )
    missing = [name for name in chosen.split(",") if name not in names]
    if missing:
        return Check.fail(
            "gloo interface",
            f"GLOO_SOCKET_IFNAME names {', '.join(missing)}, which is not there",
            f"unset it, or use one of {', '.join(names)}",
        )
    if chosen == "lo":
        return Check.warn(
            "gloo interface",
            "GLOO_SOCKET_IFNAME=lo: only groups on this machine can average",
            "unset it, or name a network interface, before a run on several machines",
        )
    return Check.ok("gloo interface", f"GLOO_SOCKET_IFNAME={chosen}")


def gloo(*, timeout_s: float = 10.0) -> Check:
    """Two gloo ranks in this process average a number, over the interface gloo takes."""
    try:
        from torchft.cli.checks.gloo_pair import average_of_pair
    except ImportError as error:
        return Check.fail("gloo", f"cannot be tried: {error}", "install torch 2.7 or later")
    fix = "set GLOO_SOCKET_IFNAME to an interface that is up, such as lo for one machine"
    try:
        mean = average_of_pair(timeout_s=timeout_s)
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Check.fail("gloo", f"two ranks here cannot connect: {first}", fix)
    if mean != 1.5:
        return Check.fail("gloo", f"the average of 1 and 2 came out as {mean}", "reinstall torch")
    return Check.ok("gloo", "two ranks in this process connect and average")
