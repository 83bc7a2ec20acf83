"""The command line of a training script: flags, log lines, and one last line about what is wrong.

Exit codes: 1 for what went wrong, 2 for what was typed or set wrongly. torchrun restarts a worker
that failed; where that cannot help, because the same setting or the same absent lighthouse would
be met again, its agent is asked to end instead.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from torchft import settings
from torchft.arguments import at_least
from torchft.errors import SettingsError, TorchftError, UnreachableError

__all__ = [
    "joining",
    "require_torchrun",
    "run_script",
    "shared_flags",
    "show_events",
    "which_group",
]


def shared_flags(doc: str | None, *, finish_together_s: int) -> argparse.ArgumentParser:
    """Return a parser with `--finish-together-s` and `--corpus`; add your own flags to it.

    Args:
        doc: the script's docstring; its first line becomes the description.
        finish_together_s: the default of that flag, seconds.
    """
    about = (doc or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument(
        "--finish-together-s",
        type=at_least(0),
        default=finish_together_s,
        metavar="SECONDS",
        help=f"go on so long for a group that is away at the end ({finish_together_s})",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a text file or a folder of them; may be repeated (the standard library's sources)",
    )
    return parser


def require_torchrun() -> None:
    """Exit with the lines to type where torchrun or the lighthouse's address is missing."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if settings.text(name) is None]
    if missing:
        sys.exit(
            f"{', '.join(missing)} not set: start this script by torchrun, as in\n"
            f"  torchrun --master_port=29600 --nnodes=1 --nproc_per_node=1 {sys.argv[0]}"
        )
    if settings.text(settings.LIGHTHOUSE) is None:
        sys.exit(
            f"{settings.LIGHTHOUSE} is not set: start a lighthouse by\n"
            "  torchft_lighthouse --min_replicas 1\n"
            "and set it to the address, such as http://localhost:29510"
        )


def show_events() -> None:
    """Log quorums, heals and errors of rank 0 as plain lines, and warnings of the other ranks."""
    logging.basicConfig(format="%(message)s")
    first = settings.integer("RANK", 0) == 0
    logging.getLogger("torchft.manager").setLevel(logging.INFO if first else logging.WARNING)


def which_group() -> tuple[int, int]:
    """Read the number of this group and how many there are; by default group 0 of 2.

    Raises:
        SettingsError: REPLICA_GROUP_ID or NUM_REPLICA_GROUPS is not such a number.
    """
    groups = settings.integer("NUM_REPLICA_GROUPS", 2, least=1)
    group = settings.integer("REPLICA_GROUP_ID", 0)
    if not 0 <= group < groups:
        raise SettingsError(
            f"REPLICA_GROUP_ID={group}: with NUM_REPLICA_GROUPS={groups} it must be from 0 to "
            f"{groups - 1}, another one in each group"
        )
    return group, groups


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """Wrap the making of the manager: a lighthouse that does not answer then is taken for absent.

    Raises:
        UnreachableError: instead of any TimeoutError inside the block.
    """
    try:
        yield
    except TimeoutError as error:
        raise UnreachableError(str(error)) from error


def run_script(main: Callable[[], None], name: str) -> int:
    """Run `main` of the script `name`, print an error of this package as one line; return the code.

    From here on SIGTERM is raised as SystemExit, so that `finally` runs and frees the ports. The
    other groups miss this one a heartbeat timeout later.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        main()
    except (TorchftError, TimeoutError) as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, SettingsError | UnreachableError):
            _spare_restarts()
        return 2 if isinstance(error, SettingsError) else 1
    return 0


def _spare_restarts() -> None:
    """Ask the agent that would start this worker again to end."""
    most = settings.integer("TORCHELASTIC_MAX_RESTARTS", 0)
    if settings.under_torchrun() and settings.integer("TORCHELASTIC_RESTART_COUNT", 0) < most:
        os.kill(os.getppid(), signal.SIGTERM)
