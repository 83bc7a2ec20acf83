"""How a row of numbers travels: cut into chunks, each encoded by itself, each with its checksum.

    chunk   the encoded numbers, then a checksum of 8 bytes
    row     chunks of 2²⁰ numbers, the last one shorter

Sizes follow from the number of numbers and the codec, so none of them travels, and both ends know
the length of everything before the first byte. A transfer that broke goes on where a chunk begins.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchft.errors import TorchftError
from torchft.quantization import Codec

__all__ = ["CHUNK", "ChunkError", "Chunks", "checksum_of", "identity_from", "identity_of"]

CHUNK = 1 << 20
"""Numbers in a chunk; a multiple of every codec's block."""
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
        """How many chunks the row has."""
        return -(-self.n // CHUNK)

    @property
    def nbytes(self) -> int:
        """Bytes of the row on the wire, checksums included."""
        return self.offset(self.count)

    def span(self, index: int) -> slice:
        """The positions of the numbers that chunk `index` holds."""
        return slice(index * CHUNK, min(self.n, (index + 1) * CHUNK))

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Each chunk's index, and which numbers it holds."""
        return ((index, self.span(index)) for index in range(self.count))

    def nbytes_of(self, index: int) -> int:
        """Bytes of chunk `index` on the wire, its checksum included."""
        span = self.span(index)
        return self.codec.encoded_bytes(span.stop - span.start) + TRAILER.size

    def offset(self, index: int) -> int:
        """Bytes of the row before chunk `index` begins."""
        if index == self.count and index:
            return self.offset(index - 1) + self.nbytes_of(index - 1)
        return index * (self.codec.encoded_bytes(CHUNK) + TRAILER.size)

    def part(self, index: int, row: memoryview) -> memoryview:
        """The bytes of chunk `index` in an encoded row."""
        return row[self.offset(index) :][: self.nbytes_of(index)]

    def encode(self, index: int, numbers: Tensor) -> bytes:
        """Chunk `index` on the wire, of its numbers `[1, m]`."""
        out = bytearray(self.nbytes_of(index))
        self.encode_into(memoryview(out), index, numbers)
        return bytes(out)

    def encode_into(self, out: memoryview, index: int, numbers: Tensor) -> None:
        """Write what `encode` returns into memory of its length."""
        data = self.codec.encode(numbers.contiguous())[0].numpy().data
        out[: -TRAILER.size] = data
        out[-TRAILER.size :] = TRAILER.pack(_checksum(data, index))

    def decode(self, index: int, data: memoryview, out: Tensor) -> Tensor:
        """The numbers of chunk `index`, fp32, written into `out` `[1, m]`.

        Raises:
            ChunkError: it is too short or too long, or its checksum does not match.
        """
        return self.codec.decode(self._encoded(index, data), out.shape[1], out=out)

    def add(self, index: int, data: memoryview, total: Tensor) -> Tensor:
        """Add the numbers of chunk `index` to `total` `[1, m]`. Raises ChunkError as `decode`."""
        return self.codec.decode_add_(total, self._encoded(index, data))

    def norm(self, index: int, data: memoryview) -> float:
        """L2 norm of the numbers of chunk `index`. Raises ChunkError as `decode`."""
        span = self.span(index)
        encoded = self._encoded(index, data)
        return float(torch.linalg.vector_norm(self.codec.decode(encoded, span.stop - span.start)))

    def _encoded(self, index: int, data: memoryview) -> Tensor:
        body = self.check(index, data)
        return torch.frombuffer(bytearray(body) if body.readonly else body, dtype=torch.uint8)[None]

    def check(self, index: int, data: memoryview) -> memoryview:
        """The encoded numbers of chunk `index`, without its checksum.

        Raises:
            ChunkError: it is too short or too long, or its checksum does not match.
        """
        if len(data) != self.nbytes_of(index):
            raise ChunkError(
                f"chunk {index} has {len(data)} bytes, not {self.nbytes_of(index)}: send it again"
            )
        body = data[: -TRAILER.size]
        if _checksum(body, index) != TRAILER.unpack(data[-TRAILER.size :])[0]:
            raise ChunkError(f"the checksum of chunk {index} does not match: send it again")
        return body

    def memory(self) -> memoryview:
        """New memory that takes the longest chunk."""
        return memoryview(bytearray(self.nbytes_of(0) if self.count else 0))

    def numbers(self) -> Tensor:
        """New memory for the numbers of the longest chunk, fp32 `[1, m]` on the CPU."""
        return torch.empty(1, self.span(0).stop, dtype=torch.float32, device="cpu")

    def prepare(self, path: Path) -> Path:
        """Make `path` a file that a row can be written into, over whatever is there."""
        with path.open("ab") as file:
            file.truncate(min(file.tell(), self.nbytes))
        return path

    def read(self, path: Path) -> Iterator[memoryview]:
        """The chunks of the row in a file, one after the other in the same memory.

        Raises:
            ChunkError: the file has another length.
        """
        memory = self.memory()
        for index in range(self.count):
            yield self.read_one(path, index, memory)

    def read_one(self, path: Path, index: int, memory: memoryview) -> memoryview:
        """Read chunk `index` of the row in a file into `memory`, and return its part of it.

        Raises:
            ChunkError: the file has another length.
        """
        piece = memory[: self.nbytes_of(index)]
        with path.open("rb", buffering=0) as file:
            if (size := os.fstat(file.fileno()).st_size) != self.nbytes:
                raise ChunkError(f"{path} has {size} bytes, not {self.nbytes}")
            file.seek(self.offset(index))
            if file.readinto(piece) != len(piece):
                raise ChunkError(f"{path} ends within chunk {index}")
        return piece

    def write_one(self, path: Path, index: int, piece: memoryview) -> None:
        """Write chunk `index` of the row into a file that `prepare` made.

        Raises:
            OSError: there is no room for all of it.
        """
        with path.open("r+b", buffering=0) as file:
            file.seek(self.offset(index))
            if file.write(piece) != len(piece):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def are_complete(self, path: Path) -> bool:
        """Whether all chunks of a row are in the file and good."""
        try:
            for index, data in enumerate(self.read(path)):
                self.check(index, data)
        except (ChunkError, OSError):
            return False
        return True


def checksum_of(index: int, numbers: Tensor) -> int:
    """What chunk `index` of a row, fp32 `[1, m]`, contributes to the row's identity."""
    return _checksum(numbers[0].contiguous().numpy().view(np.uint8).data, index)


def identity_from(checksums: Iterable[int]) -> str:
    """A short text that tells one fp32 row from another, of the checksums of its chunks in order.

    16 hexadecimal digits: the sum of the row's 64-bit words, each chunk's multiplied by its place.
    It guards against mistakes and damage, not against malice.
    """
    words = 0
    for checksum in checksums:
        words = (words * _MIX + checksum) % (1 << 64)
    return f"{words:016x}"


def identity_of(row: Tensor) -> str:
    """The identity of a row `[1, n]`, as `identity_from` makes it."""
    parts = row.split(CHUNK, 1) if row.shape[1] else ()
    return identity_from(checksum_of(index, part) for index, part in enumerate(parts))


def _checksum(data: memoryview, index: int) -> int:
    words_end = len(data) & ~7
    words = np.frombuffer(data[:words_end], "<u8").sum(dtype=np.uint64)
    tail = int.from_bytes(data[words_end:], "little")
    # From 1 on: what the system fills with zeros after a crash must not match.
    return (int(words) + tail + (index + 1) * _MIX) % (1 << 64)
