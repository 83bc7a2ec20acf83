"""What a group's log says went wrong: a worker's last error, below torchrun's report of it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["last_error"]

ERROR = re.compile(r"^(?!torch\.distributed\.elastic)[\w.]*(?:Error|Exception|Lost|TooOften)\b: .+")
"""The line that ends a Python traceback; torchrun's own only say that a worker failed."""

END_OF_LOG = 1 << 18
"""How many bytes at the end are searched."""


def last_error(log: Path) -> str | None:
    """The line that ends the last traceback of a worker; None where there is none."""
    try:
        text = log.read_bytes()[-END_OF_LOG:].decode(errors="replace")
    except OSError:
        return None
    found = [line for line in text.splitlines() if ERROR.match(line)]
    return found[-1] if found else None
