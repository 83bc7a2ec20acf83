"""`torchft doctor`: what would go wrong on this machine, before a long run does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from torchft import settings
from torchft.cli.checks import lighthouse, machine, network, versions
from torchft.cli.checks.check import Check, Status

__all__ = ["add_command", "all_checks", "text_of"]

ABOUT = """\
Looks at what training in replica groups needs from this machine: versions, names, ports, the
network that gloo takes, threads, the clock, the lighthouse. Each line says how it is; below what
is not ok it says what to do. Changes nothing.

The exit code is 1 if something fails, else 0; a warning may be right for your set-up.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor` to the commands of `torchft`."""
    parser = commands.add_parser(
        "doctor",
        help="find what would go wrong on this machine",
        description=ABOUT,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--lighthouse",
        metavar="URL",
        help="the lighthouse to ask, http://HOST:PORT (TORCHFT_LIGHTHOUSE)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON array, for programs")


def run(typed: argparse.Namespace) -> int:
    """Do what was typed; returns the exit code."""
    checks: list[Check] = []
    lighthouse = settings.argument_first(typed.lighthouse, settings.LIGHTHOUSE, settings.text)
    for check in all_checks(lighthouse):
        checks.append(check)
        if not typed.json:
            print(text_of(check), flush=True)
    if typed.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    return exit_code(checks)


def all_checks(address: str | None) -> Iterator[Check]:
    """One after the other, the quick ones first; `address` is the lighthouse's."""
    yield versions.python()
    yield versions.torch()
    yield versions.package()
    yield versions.extension()
    yield versions.extras()
    yield machine.threads(settings.text("OMP_NUM_THREADS"))
    yield machine.open_files()
    yield machine.clock()
    yield network.host_name()
    yield network.look_ups()
    yield network.ipv6()
    yield network.ports(is_lighthouse=_is_lighthouse)
    yield network.gloo_interface(settings.text("GLOO_SOCKET_IFNAME"))
    yield lighthouse.lighthouse(address)
    yield network.gloo()


def _is_lighthouse(port: int) -> bool:
    try:
        lighthouse.ask(f"http://127.0.0.1:{port}", timeout_s=2.0)
    except (OSError, lighthouse.NoLighthouse):
        return False
    return True


def text_of(check: Check) -> str:
    """One line, and one more with the remedy when there is one."""
    line = f"{check.status:<5}{check.name:<16}{check.found}"
    return f"{line}\n     {'':<16}→ {check.remedy}" if check.remedy else line


def exit_code(checks: Sequence[Check]) -> int:
    """The exit code of all checks: 1 if one failed, else 0."""
    return int(any(check.status is Status.FAIL for check in checks))
