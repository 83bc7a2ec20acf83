"""How a row of numbers travels: cut into chunks, each encoded by itself, each with its checksum.

    chunk   the encoded numbers, then a checksum of 8 bytes
    row     chunks of 2²⁰ numbers, the last one shorter

Sizes follow from the number of numbers and the codec, so none of them travels, and both ends know
the length of everything before the first byte. A transfer that broke goes on at a whole chunk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchft.errors import TorchftError
from torchft.quantization import Codec

__all__ = ["CHUNK", "ChunkError", "Chunks", "identity_of"]

CHUNK = 1 << 20
"""Numbers in a chunk; whole blocks of every codec."""
TRAILER = struct.Struct("<Q")
_MIX = 0x9E3779B97F4A7C15


class ChunkError(TorchftError):
    """A chunk is not what was sent."""


@dataclass(frozen=True)
class Chunks:
    """The chunks of `n` numbers under `codec`."""

    n: int
    codec: Codec

    @property
    def count(self) -> int:
        """How many chunks."""
        return -(-self.n // CHUNK)

    @property
    def nbytes(self) -> int:
        """Of the whole row on the wire."""
        return self.offset(self.count)

    def span(self, index: int) -> slice:
        """Which numbers chunk `index` holds."""
        return slice(index * CHUNK, min(self.n, (index + 1) * CHUNK))

    def nbytes_of(self, index: int) -> int:
        """Of chunk `index`, checksum included."""
        span = self.span(index)
        return self.codec.encoded_bytes(span.stop - span.start) + TRAILER.size

    def offset(self, index: int) -> int:
        """Where chunk `index` begins."""
        if index == self.count and index:
            return self.offset(index - 1) + self.nbytes_of(index - 1)
        return index * (self.codec.encoded_bytes(CHUNK) + TRAILER.size)

    def encode(self, index: int, numbers: Tensor) -> bytes:
        """Chunk `index`, of its numbers `[1, m]`."""
        data = self.codec.encode(numbers.contiguous())[0].numpy().data
        return data.tobytes() + TRAILER.pack(_checksum(data, index))

    def decode(self, index: int, data: memoryview, out: Tensor) -> Tensor:
        """The numbers of chunk `index`, fp32, written into `out` `[1, m]`.

        Raises:
            ChunkError: it is too short or too long, or its checksum does not match.
        """
        body = self.check(index, data)
        span = self.span(index)
        encoded = torch.frombuffer(bytearray(body) if body.readonly else body, dtype=torch.uint8)
        return self.codec.decode(encoded[None], span.stop - span.start, out=out)

    def check(self, index: int, data: memoryview) -> memoryview:
        """The encoded numbers of chunk `index`. Raises as `decode`."""
        if len(data) != self.nbytes_of(index):
            raise ChunkError(
                f"chunk {index} has {len(data)} bytes, not {self.nbytes_of(index)}: send it again"
            )
        body = data[: -TRAILER.size]
        if _checksum(body, index) != TRAILER.unpack(data[-TRAILER.size :])[0]:
            raise ChunkError(f"the checksum of chunk {index} does not match: send it again")
        return body

    def read(self, path: Path) -> Iterator[memoryview]:
        """The chunks of a whole row in a file, one after the other in the same memory.

        Raises:
            ChunkError: the file has another length.
        """
        memory = memoryview(bytearray(max(map(self.nbytes_of, range(self.count)), default=0)))
        with path.open("rb", buffering=0) as file:
            if (size := os.fstat(file.fileno()).st_size) != self.nbytes:
                raise ChunkError(f"{path} has {size} bytes, not {self.nbytes}")
            for index in range(self.count):
                piece = memory[: self.nbytes_of(index)]
                file.readinto(piece)
                yield piece


def identity_of(row: Tensor) -> str:
    """A short text that tells one fp32 row `[1, n]` from another: 16 hexadecimal digits.

    The sum of its 64-bit words, each chunk's multiplied by its place. It guards against mistakes
    and damage, not against malice.
    """
    words = 0
    for index, begin in enumerate(range(0, row.shape[1], CHUNK)):
        data = row[0, begin : begin + CHUNK].contiguous().numpy().view(np.uint8).data
        words = (words * _MIX + _checksum(data, index)) % (1 << 64)
    return f"{words:016x}"


def _checksum(data: memoryview, index: int) -> int:
    whole = len(data) & ~7
    words = np.frombuffer(data[:whole], "<u8").sum(dtype=np.uint64)
    tail = int.from_bytes(data[whole:], "little")
    return (int(words) + tail + index * _MIX) % (1 << 64)
