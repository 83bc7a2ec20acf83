"""`diloco status`: what a server does; the exit code is 1 when it cannot be asked."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchft import settings
from torchft.errors import TorchftError

__all__ = ["add_command", "table"]


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `status` and its flags to the commands."""
    parser = commands.add_parser(
        "status",
        help="show what a server does; exit code 1 if it cannot be asked",
        allow_abbrev=True,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--server", metavar="HOST:PORT", help="default: DILOCO_SERVER, else localhost:8512"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--watch", action="store_true", help="again every two seconds")
    parser.add_argument("--auth-token", metavar="TOKEN", help="one that may read")
    parser.add_argument("--auth-token-file", type=Path, metavar="FILE", help="the server's tokens")


def run(typed: argparse.Namespace) -> int:
    """Ask the server and print its status; returns 1 where it cannot be asked, else 0."""
    while True:
        try:
            status = _ask(typed)
        except TorchftError as error:
            print(f"diloco: {error}", file=sys.stderr)
            return 1
        print(json.dumps(status) if typed.json else "\n".join(table(status)), flush=True)
        if not typed.watch:
            return 0
        time.sleep(2.0)


def _ask(typed: argparse.Namespace) -> dict[str, Any]:
    from torchft.parameter_server.auth import Scope, default_token_file, find_token
    from torchft.parameter_server.worker.client import DiLoCoClient

    server = settings.argument_first(typed.server, settings.DILOCO_SERVER, settings.text)
    server = server or "localhost:8512"
    own = default_token_file(DiLoCoClient(server).port)
    token = find_token(Scope.READ, typed.auth_token, typed.auth_token_file, own)
    tls_ca = settings.path_or_none(settings.DILOCO_TLS_CA)
    client = DiLoCoClient(server, token=token, timeout_s=10.0, tls_ca=tls_ca)
    try:
        return client.get("/v1/status")
    finally:
        client.close()


def table(status: dict[str, Any]) -> Iterator[str]:
    """The status of a server as lines for people to read."""
    workers = status["workers"]
    yield (
        f"{status['mode']}: {status['rounds']} rounds in {status['uptime_s']:.0f} s, "
        f"{len(workers)} of {status['num_workers']} workers (at least {status['min_workers']}), "
        f"outer lr {status['outer_lr']:g}, momentum {status['outer_momentum']:g}"
    )
    yield (
        f"{status['submissions']} submissions, {status['late']} late, {status['refused']} refused; "
        f"{status['bytes_in'] / 1e6:.1f} MB in, {status['bytes_out'] / 1e6:.1f} MB out; "
        f"{status['total_worker_deaths']} workers died"
    )
    for index, fragment in enumerate(status["fragments"]):
        yield f"fragment {index}: version {fragment['version']}; {fragment['waiting']}"
    for name, worker in workers.items():
        state = "silent" if worker["silent"] else "heard"
        yield (
            f"  {name} on {worker['hostname']}: {worker['steps_per_second']:.2f} steps/s, {state} "
            f"{worker['last_heartbeat_s_ago']:.1f} s ago"
        )
