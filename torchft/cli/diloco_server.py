"""`diloco server`: what was typed, what it means, do it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torchft.errors import SettingsError
from torchft.numbers import at_least

if TYPE_CHECKING:
    from torchft.parameter_server.auth import Tokens
    from torchft.parameter_server.core.options import ServerOptions

__all__ = ["add_command", "options_of"]

ABOUT = """\
Hold the common weights, take workers' deltas, and step the outer optimizer.

The run goes on from the newest good checkpoint in the output folder, with all that happened after
it. Otherwise it begins with the model in --model, or with the first worker's weights. SIGTERM and
Ctrl-C save and end it with code 0.

examples:
  diloco server -o out -n 2
  diloco server -o out -n 8 -m models/tiny --mode decoupled --min-workers 4 --host 0.0.0.0
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "server",
        help="start a parameter server",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    _rounds(parser)
    _storage(parser)
    _network(parser)
    outer = parser.add_argument_group("outer optimizer")
    outer.add_argument("--outer-lr", type=float, default=0.7)
    outer.add_argument("--outer-momentum", type=float, default=0.9)
    outer.add_argument("--no-nesterov", action="store_true", help="plain momentum")
    outer.add_argument(
        "--dn-buffer-size",
        type=at_least(0),
        metavar="N",
        help="asynchronous: submissions to a turn of the delayed momentum (default: -n); 0: "
        "momentum moves with each",
    )


def _rounds(parser: argparse.ArgumentParser) -> None:
    rounds = parser.add_argument_group("rounds")
    rounds.add_argument(
        "-n",
        "--num-workers",
        type=at_least(1),
        required=True,
        help="a synchronous run begins when so many have registered",
    )
    rounds.add_argument(
        "--min-workers", type=at_least(1), default=1, help="no round closes with fewer (default 1)"
    )
    mode = rounds.add_mutually_exclusive_group()
    mode.add_argument(
        "--mode",
        choices=["synchronous", "decoupled", "asynchronous"],
        default="synchronous",
        help="decoupled: --min-workers and a grace window close a round (default synchronous)",
    )
    mode.add_argument(
        "--async",
        dest="mode",
        action="store_const",
        const="asynchronous",
        help="the same as --mode asynchronous",
    )
    rounds.add_argument(
        "--grace",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds of silence after which a worker is not waited for; longest grace window",
    )
    rounds.add_argument(
        "--heartbeat-timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds of silence after which it is a worker no more; 0: never",
    )
    rounds.add_argument(
        "--max-staleness", type=at_least(0), metavar="N", help="refuse work that is older"
    )
    rounds.add_argument("--dylu", action="store_true", help="slower workers take fewer steps")
    rounds.add_argument("--dylu-base-sync-every", type=at_least(1), metavar="H")
    rounds.add_argument(
        "--norm-bound",
        type=float,
        default=10.0,
        metavar="X",
        help="refuse a delta with more than X times the weights' norm; 0: none",
    )
    agreed = parser.add_argument_group(
        "for all workers", "what is not given is what the first worker asks for"
    )
    agreed.add_argument("--sync-every", type=at_least(1), metavar="H")
    agreed.add_argument("--num-fragments", type=at_least(1), metavar="N")
    agreed.add_argument("--codec", choices=["fp32", "bf16", "fp8", "int8", "int4"])


def _storage(parser: argparse.ArgumentParser) -> None:
    storage = parser.add_argument_group("files")
    storage.add_argument("-o", "--output-dir", type=Path, help="checkpoints, journal and spool")
    storage.add_argument(
        "-m", "--model", type=Path, metavar="DIR", help="begin with the safetensors in DIR"
    )
    storage.add_argument(
        "-c", "--from-checkpoint", type=Path, metavar="DIR", help="go on from this one instead"
    )
    storage.add_argument(
        "--save-every", type=at_least(0), default=10, help="rounds; 0: never (default 10)"
    )
    storage.add_argument(
        "--save-total-limit", type=at_least(0), default=3, help="kept; 0: all (default 3)"
    )


def _network(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for workers elsewhere")
    network.add_argument("--port", type=at_least(0), default=8512, help="0: a free one")
    network.add_argument("--auth-token", metavar="TOKEN", help="the admin's, 16 characters or more")
    network.add_argument("--auth-token-file", type=Path, metavar="FILE")
    network.add_argument("--regen-token", action="store_true", help="make new ones")
    network.add_argument("--no-auth", action="store_true", help="everybody may do everything")
    network.add_argument("--tls-cert", type=Path, metavar="PEM")
    network.add_argument("--tls-key", type=Path, metavar="PEM")


def options_of(typed: argparse.Namespace) -> ServerOptions:
    """What was typed, checked. Raises SettingsError."""
    from torchft.parameter_server.core.options import OuterOptions, ServerOptions
    from torchft.parameter_server.core.rules import Mode, Rules

    folder = typed.output_dir or typed.model
    if folder is None:
        raise SettingsError("say where to write: -o OUT, or -m MODEL to write beside the model")
    return ServerOptions(
        output_dir=folder,
        rules=Rules(
            workers=typed.num_workers,
            mode=Mode(typed.mode),
            min_workers=typed.min_workers,
            grace_s=typed.grace,
            heartbeat_timeout_s=typed.heartbeat_timeout,
            max_staleness=typed.max_staleness,
        ),
        outer=OuterOptions(
            lr=typed.outer_lr,
            momentum=typed.outer_momentum,
            nesterov=not typed.no_nesterov,
            dn_buffer_size=typed.dn_buffer_size,
        ),
        model=typed.model,
        from_checkpoint=typed.from_checkpoint,
        save_every=typed.save_every,
        save_total_limit=typed.save_total_limit,
        dylu=typed.dylu,
        dylu_base_sync_every=typed.dylu_base_sync_every,
        norm_bound=typed.norm_bound,
        sync_every=typed.sync_every,
        codec=typed.codec,
        fragments=typed.num_fragments,
    )


def run(typed: argparse.Namespace) -> int:
    """Serve until a signal."""
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
