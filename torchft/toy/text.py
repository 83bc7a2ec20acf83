"""Where the text to learn comes from: the user's files, or the standard library's sources.

Only files are read here, without torch, so that a launcher can check them before it starts anybody.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from torchft.errors import SettingsError

__all__ = ["CorpusError", "name_of", "read_text"]

STDLIB_BYTES = 4 << 20
"""How much of the standard library is read: enough for hours at this model's size."""


class CorpusError(SettingsError):
    """The text cannot be used: a file is unreadable, or there is too little of it."""


def name_of(paths: Sequence[Path]) -> str:
    """What to call the text of these paths in a message."""
    return ", ".join(map(str, paths)) if paths else "the Python standard library"


def read_text(paths: Sequence[Path] = ()) -> bytes:
    """Read files and folders (all text files below, by name), or the standard library.

    Raises:
        CorpusError: a path is missing or unreadable, or there is no text in what was read.
    """
    if not paths:
        return _standard_library()
    text = b"\n".join(_read(file) for path in paths for file in _files_below(path))
    if not text:
        raise CorpusError(f"the corpus is empty: {name_of(paths)} holds no text")
    return text


def _standard_library() -> bytes:
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    size = 0
    # The top folder only: packages such as `test` and `site-packages` would drown the rest.
    for file in sorted(root.glob("*.py")):
        if size >= STDLIB_BYTES:
            break
        parts.append(_read(file))
        size += len(parts[-1])
    if not parts:
        raise CorpusError(
            f"this Python has no library sources in {root}: name text files with --corpus PATH"
        )
    return b"\n".join(parts)[:STDLIB_BYTES]


def _files_below(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    found = False
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.is_file() and not hidden and _is_text(file):
            found = True
            yield file
    if not found:
        raise CorpusError(f"there is no text file below {path}")


def _is_text(file: Path) -> bool:
    """A zero byte early on means that it is something else: the test that git and grep use."""
    return b"\0" not in _read(file, at_most=1024)


def _read(file: Path, at_most: int = -1) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read(at_most)
    except OSError as error:
        raise CorpusError(f"cannot read {file}: {error.strerror}; check --corpus") from error
