"""The outer step of one fragment, chunk by chunk, on several cores: from uploads to an update.

    mean      Σ weight · delta / how many, of the round's uploads
    step      of the outer optimizer, in place
    update    the weights, or the encoded difference to what workers hold, written to a file

Chunks depend on nothing but themselves. Each thread takes every T-th and has room for one, so that
no step takes memory by the size of the model, and the bits are those of one thread.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchft.parameter_server.core.chunks import Chunks, checksum_of, identity_from

__all__ = ["OuterStep"]

_THREADS = min(4, os.cpu_count() or 1)


class _Stepped(NamedTuple):
    """What a chunk tells of itself."""

    at: int
    squares: float
    """Of the norm of its weights."""
    checksum: int
    """Of what workers hold."""


@dataclass(frozen=True)
class OuterStep:
    """`uploads` are encoded deltas and their weights in the mean; `step(index, mean)` steps a chunk
    of `weights`, fp32 `[1, n]`. `sent` is what workers hold, or `weights` itself where the codec
    loses nothing. The update is written to `path`, over what is there."""

    chunks: Chunks
    uploads: Sequence[tuple[Path, float]]
    step: Callable[[int, Tensor], None]
    weights: Tensor
    sent: Tensor
    path: Path

    def take(self) -> tuple[float, str]:
        """Take the step, and return the L2 norm of the new weights and the identity of what workers
        are to hold.

        Raises:
            ChunkError, OSError: an upload cannot be read again, or the update cannot be written.
                Some chunks are stepped then, and others are not.
        """
        self.chunks.prepare(self.path)
        threads = max(1, min(_THREADS, self.chunks.count))
        with ThreadPoolExecutor(threads, "outer-step") as pool:
            parts = [pool.submit(self._every, first, threads) for first in range(threads)]
        stepped = sorted(one for part in parts for one in part.result())
        norm = math.sqrt(sum(one.squares for one in stepped))
        return norm, identity_from(one.checksum for one in stepped)

    @torch.no_grad()
    def _every(self, first: int, stride: int) -> list[_Stepped]:
        mean, memory = _Mean(self.chunks, self.uploads), self.chunks.memory()
        stepped = []
        for index in range(first, self.chunks.count, stride):
            self.step(index, mean.of(index))
            span = self.chunks.span(index)
            norm = float(torch.linalg.vector_norm(self.weights[:, span]))
            self._publish(index, memory)
            stepped.append(_Stepped(index, norm**2, checksum_of(index, self.sent[:, span])))
        return stepped

    def _publish(self, index: int, memory: memoryview) -> None:
        chunks, span = self.chunks, self.chunks.span(index)
        weights, sent = self.weights[:, span], self.sent[:, span]
        piece = memory[: chunks.nbytes_of(index)]
        lossy = self.sent is not self.weights
        chunks.encode_into(piece, index, weights - sent if lossy else weights)
        if lossy:
            chunks.add(index, piece, sent)
        chunks.write_one(self.path, index, piece)


class _Mean:
    """Of the uploads, chunk by chunk."""

    def __init__(self, chunks: Chunks, uploads: Sequence[tuple[Path, float]]) -> None:
        self._chunks, self._uploads = chunks, uploads
        self._memory = chunks.memory()
        self._room = chunks.numbers(), chunks.numbers()

    def of(self, index: int) -> Tensor:
        """The mean of chunk `index`, valid until the next call. Raises ChunkError, OSError."""
        chunks, span = self._chunks, self._chunks.span(index)
        mean, numbers = (room[:, : span.stop - span.start] for room in self._room)
        for position, (path, weight) in enumerate(self._uploads):
            piece = chunks.read_one(path, index, self._memory)
            if position and weight == 1.0:
                chunks.add(index, piece, mean)
                continue
            out = chunks.decode(index, piece, numbers if position else mean)
            if weight != 1.0:
                out.mul_(weight)
            if position:
                mean.add_(numbers)
        return mean.div_(len(self._uploads)) if len(self._uploads) != 1 else mean
