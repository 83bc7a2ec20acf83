"""Files and folders that are there as a whole, or not at all: written aside, then renamed.

with replacing(path) as draft:
    draft.write_text("…")             # an error in here leaves `path` as it was
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["aside", "gone_of", "put_in_place", "remove", "replacing"]


@contextmanager
def replacing(path: Path, draft: Path | None = None, *, sync: bool = False) -> Iterator[Path]:
    """A draft to write, file or folder, which takes the place of `path` at the end of the block.

    Args:
        path: what is replaced; nobody sees it half written.
        draft: on the same file system; by default beside `path`, by a name of this process.
        sync: force the content to disk before its name is there, as a power failure needs it.

    Raises:
        OSError: the disk is full, or broken. Then, and after any error in the block, `path` is as
            it was, and the draft is gone.
    """
    if draft is None:
        draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        yield draft
        put_in_place(draft, path, sync=sync)
    finally:
        remove(draft)


def put_in_place(draft: Path, path: Path, *, sync: bool = False) -> None:
    """Give what is complete its name. A folder that has the name already is removed afterwards.

    Raises:
        OSError: it cannot be renamed, or not forced to disk.
    """
    if sync:
        for written in [*draft.rglob("*"), draft]:
            _sync(written)
    with aside(path):
        os.replace(draft, path)
        if sync:
            _sync(path.parent)


@contextmanager
def aside(path: Path) -> Iterator[None]:
    """A folder has another name in the block, and is removed after it, or put back after an
    error. No half of it is ever seen under its name.

    Raises:
        OSError: it cannot be renamed.
    """
    gone = path.with_name(gone_of(path.name))
    remove(gone)
    if not path.is_dir():
        yield
        return
    os.rename(path, gone)
    try:
        yield
    except BaseException:
        if not path.exists():
            os.rename(gone, path)
        raise
    remove(gone)


def gone_of(name: str) -> str:
    """The name that a folder of that name has before it is removed."""
    return f".{name}.gone"


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is not there is fine."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)
