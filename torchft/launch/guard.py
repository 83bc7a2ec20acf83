"""A script that starts processes, and one that such a process imports: the same file.

A process that is not forked from its parent first runs the parent's script again, for what the
script defines. What trains must not run there, so it stands behind the guard.
"""

from __future__ import annotations

import multiprocessing
import sys

from torchft.errors import SettingsError

__all__ = ["HINT", "check_guarded", "main_file"]

HINT = "put the part of it that trains under `if __name__ == '__main__':`"


def check_guarded() -> None:
    """Refuse to train in a process that is only being started.

    Raises:
        SettingsError: it imports a script which trains when it is imported.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SettingsError(f"a process of this script imports it, which would train again: {HINT}")


def main_file() -> str | None:
    """The script that a process would import; None: there is none, as in a notebook."""
    return getattr(sys.modules["__main__"], "__file__", None)
