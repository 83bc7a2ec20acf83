"""`diloco worker -- COMMAND …`: run a training script with the `DILOCO_*` variables set."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from torchft import settings
from torchft.arguments import CODECS, at_least
from torchft.errors import SettingsError

__all__ = ["add_command", "environment_of"]

ABOUT = """\
Run COMMAND as a worker: its DiLoCoWorker finds the server and the settings in the environment,
where a flag wins over a variable that is set already. The exit code is the command's.

example:
  diloco worker --server gpu-1:8512 --sync-every 100 -- python train.py
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `worker` and its flags to the commands."""
    parser = commands.add_parser(
        "worker",
        help="run a command as a worker",
        description=ABOUT,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--server", metavar="HOST:PORT", help="default: DILOCO_SERVER")
    parser.add_argument("--sync-every", type=at_least(1), metavar="H", help="default 500")
    parser.add_argument("--worker-id", metavar="ID", help="default: host name and 8 random digits")
    parser.add_argument("--no-bf16", action="store_true", help="send fp32")
    parser.add_argument("--codec", choices=CODECS, help="how deltas are encoded (default bf16)")
    parser.add_argument("--dylu", action="store_true", help="take the steps the server recommends")
    parser.add_argument("--heartbeat-interval", type=float, metavar="S", help="default 30; 0: none")
    parser.add_argument("-d", "--devices", metavar="LIST", help="sets CUDA_VISIBLE_DEVICES")
    parser.add_argument("--num-fragments", type=at_least(1), metavar="N", help="default 1")
    parser.add_argument("--auth-token-file", metavar="FILE", help="the server's tokens")
    parser.add_argument("--dry-run", action="store_true", help="print the command and do nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …")


def environment_of(typed: argparse.Namespace) -> dict[str, str]:
    """The variables that the flags set. A flag wins over all variables of the same meaning: those
    that would win over it at the worker are set to nothing."""
    beaten = {
        settings.DILOCO_CODEC: typed.no_bf16,
        settings.DILOCO_AUTH_TOKEN: typed.auth_token_file,
    }
    found = {
        **{name: "" for name, flag in beaten.items() if flag and settings.text(name)},
        settings.DILOCO_SERVER: typed.server,
        settings.DILOCO_SYNC_EVERY: typed.sync_every,
        settings.DILOCO_WORKER_ID: typed.worker_id,
        settings.DILOCO_BF16_COMM: 0 if typed.no_bf16 else None,
        settings.DILOCO_DYLU: 1 if typed.dylu else None,
        settings.DILOCO_HEARTBEAT_INTERVAL: typed.heartbeat_interval,
        settings.DILOCO_NUM_FRAGMENTS: typed.num_fragments,
        settings.DILOCO_AUTH_TOKEN_FILE: typed.auth_token_file,
        "CUDA_VISIBLE_DEVICES": typed.devices,
    }
    if typed.codec is not None:
        found[settings.DILOCO_CODEC] = typed.codec
    return {name: str(value) for name, value in found.items() if value is not None}


def run(typed: argparse.Namespace) -> int:
    """Run the command, pass signals on to it, and return its exit code.

    Raises:
        SettingsError: there is no command or no server, or the command cannot be run.
    """
    command = typed.command[1:] if typed.command[:1] == ["--"] else typed.command
    if not command:
        raise SettingsError("say what to run: diloco worker --server HOST:PORT -- python train.py")
    added = environment_of(typed)
    if typed.server is None and settings.text(settings.DILOCO_SERVER) is None:
        raise SettingsError("say where the server is: --server HOST:PORT, or DILOCO_SERVER")
    if typed.dry_run:
        words = [f"{name}={shlex.quote(value)}" for name, value in added.items()]
        print(" ".join([*words, shlex.join(command)]))
        return 0
    try:
        child = subprocess.Popen(command, env=settings.for_child(**added))
    except OSError as error:
        raise SettingsError(f"cannot run {command[0]}: {error.strerror}") from None
    with _signals_to(child):
        code = child.wait()
    return 128 - code if code < 0 else code


@contextmanager
def _signals_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """The command ends by itself: what asks this process to end asks the command."""

    def forward(number: int, _: object) -> None:
        if child.poll() is None:
            os.kill(child.pid, number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
