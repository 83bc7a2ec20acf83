"""`diloco server`: what was typed, what it means, do it."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchft.arguments import at_least
from torchft.errors import SettingsError

if TYPE_CHECKING:
    from torchft.parameter_server.auth import Tokens
    from torchft.parameter_server.core.options import ServerOptions

__all__ = ["add_command", "options_of"]

ABOUT = """\
Hold the weights that all workers share, take the workers' changes, and step the outer optimizer.

A run goes on from the newest good checkpoint in the output folder and what happened after it. A new
one begins with the model in --model, or with the first worker's weights. SIGTERM and Ctrl-C save
the run and end the server with exit code 0.

examples:
  diloco server -o out -n 2
  diloco server -o out -n 8 -m models/tiny --mode decoupled --min-workers 4 --host 0.0.0.0
"""

PORT = 8512


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `server` and its flags, named as the fields of the options that they set."""
    parser = commands.add_parser(
        "server",
        help="start a parameter server",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    _rounds(parser)
    _files(parser)
    _network(parser)
    add = parser.add_argument_group("outer optimizer").add_argument
    add("--outer-lr", dest="lr", type=float, metavar="X", help="learning rate (default 0.7)")
    add("--outer-momentum", dest="momentum", type=float, metavar="X", help="default 0.9")
    add(
        "--no-nesterov",
        dest="nesterov",
        action="store_const",
        const=False,
        help="plain momentum instead of Nesterov's",
    )
    add(
        "--dn-buffer-size",
        type=at_least(0),
        metavar="N",
        help="asynchronous: the momentum moves once in N submissions (default: as many as workers "
        "are expected); 0: with each",
    )


def _rounds(parser: argparse.ArgumentParser) -> None:
    rounds = parser.add_argument_group("rounds")
    add = rounds.add_argument
    add(
        *("-n", "--num-workers"),
        dest="workers",
        type=at_least(1),
        metavar="N",
        required=True,
        help="a synchronous run begins when so many have registered",
    )
    add(
        "--min-workers",
        type=at_least(1),
        metavar="N",
        help="no round closes with submissions of fewer workers (default 1)",
    )
    mode = rounds.add_mutually_exclusive_group()
    mode.add_argument(
        "--mode",
        choices=["synchronous", "decoupled", "asynchronous"],
        help="decoupled: --min-workers and a grace window close a round (default synchronous)",
    )
    mode.add_argument(
        "--async",
        dest="mode",
        action="store_const",
        const="asynchronous",
        help="the same as --mode asynchronous",
    )
    add(
        "--grace",
        dest="grace_s",
        type=float,
        metavar="S",
        help="seconds of silence after which nobody waits for a worker; also the longest that a "
        "decoupled round waits for late ones (default 5)",
    )
    add(
        "--heartbeat-timeout",
        dest="heartbeat_timeout_s",
        type=float,
        metavar="S",
        help="seconds of silence after which it is no worker any more (default 120); 0: never",
    )
    add(
        "--max-staleness",
        type=at_least(0),
        metavar="N",
        help="refuse work that was measured from weights more than N rounds old",
    )
    add("--dylu", action="store_true", default=None, help="slower workers take fewer steps")
    add("--dylu-base-sync-every", type=at_least(1), metavar="H", help="steps of the fastest one")
    add(
        "--norm-bound",
        type=float,
        metavar="X",
        help="refuse changes larger than X times the weights' norm (default 10); 0: none",
    )
    shared = parser.add_argument_group(
        "for all workers", "what is not given is what the first worker asks for"
    ).add_argument
    shared("--sync-every", type=at_least(1), metavar="H", help="steps between two submissions")
    shared("--num-fragments", dest="fragments", type=at_least(1), metavar="N")
    shared("--codec", choices=["fp32", "bf16", "fp8", "int8", "int4"])


def _files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("files").add_argument
    add("-o", "--output-dir", type=Path, metavar="DIR", help="checkpoints, journal and uploads")
    add("-m", "--model", type=Path, metavar="DIR", help="begin with the safetensors in DIR")
    add(
        *("-c", "--from-checkpoint"),
        type=Path,
        metavar="DIR",
        help="go on from this checkpoint instead of the newest one",
    )
    add("--save-every", type=at_least(0), metavar="N", help="rounds; 0: never (default 10)")
    add("--save-total-limit", type=at_least(0), metavar="N", help="kept; 0: all (default 3)")


def _network(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="0.0.0.0 for workers elsewhere")
    add("--port", type=at_least(0), default=PORT, help=f"0: a free one (default {PORT})")
    add("--auth-token", metavar="TOKEN", help="the admin's, 16 characters or more")
    add("--auth-token-file", type=Path, metavar="FILE", help="where the three tokens are, or go")
    add("--regen-token", action="store_true", help="make new tokens")
    add("--no-auth", action="store_true", help="everybody may do everything")
    add("--tls-cert", type=Path, metavar="PEM")
    add("--tls-key", type=Path, metavar="PEM")


def options_of(typed: argparse.Namespace) -> ServerOptions:
    """What was typed, as checked options; a flag that was not typed keeps the option's default.

    Raises:
        SettingsError: a value cannot be, or nothing says where to write.
    """
    from torchft.parameter_server.core.options import OuterOptions, ServerOptions
    from torchft.parameter_server.core.rules import Mode, Rules

    values = {name: value for name, value in vars(typed).items() if value is not None}

    def given(options: type) -> dict[str, Any]:
        return {field.name: values[field.name] for field in fields(options) if field.name in values}

    mode = Mode(typed.mode or Mode.SYNCHRONOUS)
    folder = typed.output_dir or typed.model
    if folder is None:
        raise SettingsError("say where to write: -o OUT, or -m MODEL to write beside the model")
    return ServerOptions(
        **{**given(ServerOptions), "output_dir": folder},
        rules=Rules(**{**given(Rules), "mode": mode}),
        outer=OuterOptions(**given(OuterOptions)),
    )


def run(typed: argparse.Namespace) -> int:
    """Serve until a signal ends the server; returns the exit code.

    Raises:
        SettingsError: a flag cannot be used, or the server's own packages are not installed.
    """
    try:
        from torchft.parameter_server.server.server import Address, run_until_signal
    except ImportError as error:
        raise SettingsError(
            f"{error}: the server needs the extra `parameter-server`, so install torchft with it"
        ) from None
    options, tokens = options_of(typed), _tokens(typed)
    address = Address(typed.host, typed.port, tokens, typed.tls_cert, typed.tls_key)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    def ready(port: int) -> None:
        where = f"{typed.host}:{port}"
        print(f"diloco server listens on {where}, {options.output_dir}", flush=True)

    run_until_signal(options, address, ready)
    return 0


def _tokens(typed: argparse.Namespace) -> Tokens | None:
    from torchft.parameter_server.auth import Scope, Tokens, default_token_file

    if typed.no_auth:
        return None
    if typed.auth_token is not None:
        return Tokens.of_secret(typed.auth_token)
    if typed.auth_token_file is None and not typed.port:
        raise SettingsError("--port 0 needs --auth-token-file, or workers could not find the token")
    path = typed.auth_token_file or default_token_file(typed.port)
    tokens, new = Tokens.at(path, renew=typed.regen_token)
    if new:
        print(
            f"new tokens in {path}; a worker elsewhere needs DILOCO_AUTH_TOKEN="
            f"{tokens.by_scope[Scope.WORKER]}",
            flush=True,
        )
    return tokens
