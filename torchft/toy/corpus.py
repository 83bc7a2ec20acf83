"""The text that demo and examples learn: bytes, cut into windows, in an order that all can compute.

By default the text is the source code of the Python standard library on this machine, so nothing
is downloaded. Any text files of the user's do as well. The last tenth of the bytes is held out.

Which windows make a batch follows from (seed, batch number, shard) alone: no state to save, none
to heal, and two groups with different shards never read the same window in one pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchft.arguments import check_integer
from torchft.errors import SettingsError
from torchft.toy.text import CorpusError, name_of, read_text

__all__ = ["ByteCorpus", "CorpusError", "Order"]

HELD_OUT = 0.1
"""The part of the bytes, at the end, that is never trained on."""


class ByteCorpus:
    """Bytes split into a training part and a held-out part.

    >>> corpus = ByteCorpus.load()                       # the standard library
    >>> corpus = ByteCorpus.load([Path("my_texts")])     # files, or folders of files
    >>> inputs, targets = corpus.batch(windows, context=64)   # int64, [len(windows), 64] each
    """

    def __init__(self, text: bytes, *, source: str = "the given bytes") -> None:
        if not text:
            raise CorpusError(f"the corpus is empty: {source} holds no text; give --corpus a file")
        self.source = source
        held_out = int(len(text) * HELD_OUT)
        # A bytearray, since torch warns about views of memory that it could not write to.
        everything = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.train = everything[: len(text) - held_out]
        """uint8, the first nine tenths."""
        self.held_out = everything[len(text) - held_out :]
        """uint8, the last tenth."""

    @classmethod
    def load(cls, paths: Sequence[Path] = ()) -> ByteCorpus:
        """Read files and folders (all text files below, by name), or the standard library.

        Raises:
            CorpusError: a path is missing or unreadable, or there is no text in what was read.
        """
        return cls(read_text(paths), source=name_of(paths))

    def windows(self, context: int) -> int:
        """How many different training windows of `context` bytes and their targets there are.

        Raises:
            CorpusError: not one; the text is too short.
        """
        windows = len(self.train) - context
        if windows < 1:
            raise CorpusError(
                f"{self.source} has {len(self.train)} bytes to train on, and one window needs "
                f"{context + 1}: give --corpus a longer text"
            )
        return windows

    def batch(self, starts: Iterable[int], *, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [windows, context] each: the target is the next byte."""
        rows = torch.stack([self.train[start : start + context + 1] for start in starts]).long()
        return rows[:, :-1], rows[:, 1:]

    def held_out_batch(self, rows: int, *, context: int) -> tuple[Tensor, Tensor]:
        """Up to `rows` windows spread evenly over the held-out text, always the same ones.

        Raises:
            CorpusError: the held-out text is shorter than one window.
        """
        last = len(self.held_out) - context - 1
        if last < 0:
            raise CorpusError(
                f"the held-out tenth of {self.source} is {len(self.held_out)} bytes, and one "
                f"window needs {context + 1}: give --corpus a longer text"
            )
        starts = [last * row // max(1, rows - 1) for row in range(rows)]
        window = torch.stack([self.held_out[s : s + context + 1] for s in starts]).long()
        return window[:, :-1], window[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Order:
    """A walk over all windows that visits each once before any again, without a table.

    The walk is `start + i · stride (mod windows)` with a stride that shares no factor with
    `windows`. Batch `n` of shard `s` is the `(n · shards + s)`-th run of `rows` windows in it.
    """

    windows: int
    shards: int = 1
    rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("windows", "shards", "rows"):
            check_integer(name, getattr(self, name), least=1)

    def batch(self, number: int, *, shard: int = 0) -> list[int]:
        """Where the windows of batch `number` of this shard start.

        Raises:
            SettingsError: there is no such shard.
        """
        if not 0 <= shard < self.shards:
            raise SettingsError(f"shard {shard} of {self.shards}: shards count from 0")
        start, stride = self._walk()
        first = (number * self.shards + shard) * self.rows
        return [(start + (first + row) * stride) % self.windows for row in range(self.rows)]

    def _walk(self) -> tuple[int, int]:
        dice = random.Random(self.seed)
        start = dice.randrange(self.windows)
        stride = dice.randrange(self.windows) | 1
        while math.gcd(stride, self.windows) != 1:
            stride += 2
        return start, stride
