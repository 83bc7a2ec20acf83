"""`diloco server`: what was typed, what it means, do it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchft.arguments import CODECS, at_least
from torchft.cli.parser import given
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

_FLAGS = {
    "rounds": {
        "-n --num-workers=N": "a synchronous run begins when so many have registered",
        "--min-workers=N": "no round closes with submissions of fewer workers (default 1)",
        "--mode=synchronous|decoupled|asynchronous": "decoupled: --min-workers and a grace window "
        "close a round (default synchronous)",
        "--grace=S": "seconds of silence after which nobody waits for a worker; also the longest "
        "that a decoupled round waits for late ones (default 5)",
        "--heartbeat-timeout=S": "seconds of silence after which it is no worker any more (default "
        "120); 0: never",
        "--max-staleness=N": "refuse work that was measured from weights more than N rounds old",
        "--dylu": "slower workers take fewer steps",
        "--dylu-base-sync-every=H": "steps of the fastest one",
        "--norm-bound=X": "refuse changes larger than X times the weights' norm (default 10); 0: "
        "none",
    },
    "for all workers; what is not given is what the first worker asks for": {
        "--sync-every=H": "steps between two submissions",
        "--num-fragments=N": "parts of the model, submitted in turn",
        f"--codec={'|'.join(CODECS)}": "how numbers travel",
    },
    "files": {
        "-o --output-dir=DIR": "checkpoints, journal and uploads",
        "-m --model=DIR": "begin with the safetensors in DIR",
        "-c --from-checkpoint=DIR": "go on from this checkpoint instead of the newest one",
        "--save-every=N": "rounds; 0: never (default 10)",
        "--save-total-limit=N": "kept; 0: all (default 3)",
    },
    "network": {
        "--host=HOST": "0.0.0.0 for workers elsewhere (default 127.0.0.1)",
        "--port=N": f"0: a free one (default {PORT})",
        "--auth-token=TOKEN": "the admin's, 16 characters or more",
        "--auth-token-file=FILE": "where the three tokens are, or go",
        "--regen-token": "make new tokens",
        "--no-auth": "everybody may do everything",
        "--tls-cert=PEM": "the server's certificate",
        "--tls-key=PEM": "the key of the certificate",
    },
    "outer optimizer": {
        "--outer-lr=X": "learning rate (default 0.7)",
        "--outer-momentum=X": "default 0.9",
        "--no-nesterov": "plain momentum instead of Nesterov's",
        "--dn-buffer-size=N": "asynchronous: the momentum moves once in N submissions (default: as "
        "many as workers are expected); 0: with each",
    },
}
"""Each flag, and behind `=` what it takes; what must hold of a value, the options check."""

_NUMBERS = {"N": at_least(0), "H": at_least(1), "S": float, "X": float}
_PATHS = ("DIR", "FILE", "PEM")

_FIELDS = {
    "num_workers": "workers",
    "grace": "grace_s",
    "heartbeat_timeout": "heartbeat_timeout_s",
    "outer_lr": "lr",
    "outer_momentum": "momentum",
    "num_fragments": "fragments",
}
"""The option that a flag sets, where that has another name."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `server` and its flags to `commands`."""
    parser = commands.add_parser(
        "server",
        help="start a parameter server",
        description=ABOUT,
    )
    groups = {title: parser.add_argument_group(title) for title in _FLAGS}
    modes = groups["rounds"].add_mutually_exclusive_group()
    for title, flags in _FLAGS.items():
        for flag, meaning in flags.items():
            names, _, value = flag.partition("=")
            add = modes.add_argument if names == "--mode" else groups[title].add_argument
            action = add(*names.split(), help=meaning, **_taking(value))
            action.dest = _FIELDS.get(action.dest, action.dest)
            action.required = action.dest == "workers"
    about = "the same as --mode asynchronous"
    modes.add_argument(
        "--async", dest="mode", action="store_const", const="asynchronous", help=about
    )
    parser.set_defaults(run=run, host="127.0.0.1", port=PORT)


def _taking(value: str) -> dict[str, Any]:
    """What argparse must know of a flag that takes `value`."""
    if not value:
        return {"action": "store_true", "default": None}
    if "|" in value:
        return {"choices": value.split("|")}
    kind = _NUMBERS.get(value, Path if value in _PATHS else str)
    return {"type": kind, "metavar": value}


def options_of(typed: argparse.Namespace) -> ServerOptions:
    """What was typed, as checked options; a flag that was not typed keeps the option's default.

    Raises:
        SettingsError: a value cannot be, or nothing says where to write.
    """
    from torchft.parameter_server.core.options import OuterOptions, ServerOptions
    from torchft.parameter_server.core.rules import Mode, Rules

    meant = argparse.Namespace(**vars(typed))
    meant.mode = Mode(typed.mode or Mode.SYNCHRONOUS)
    meant.output_dir = typed.output_dir or typed.model
    meant.nesterov = not typed.no_nesterov
    if meant.output_dir is None:
        raise SettingsError("say where to write: -o OUT, or -m MODEL to write beside the model")

    rules, outer = Rules(**given(meant, Rules)), OuterOptions(**given(meant, OuterOptions))
    return ServerOptions(**given(meant, ServerOptions), rules=rules, outer_optimizer=outer)


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
