"""A state as the donor offers it: the encoded header, and leaves that are sent as they lie.

Making one copies tensors of accelerators to the CPU and nothing else, so it is as cheap as it is
short-lived: it shows the state's memory and is dropped when the window closes.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator

from torchft.checkpointing.layout import (
    ALIGNMENT,
    TRAILER,
    Block,
    Head,
    blocks_of_part,
    encode_head,
    part_bytes,
)
from torchft.checkpointing.memory import Checksum
from torchft.checkpointing.tree import encode

__all__ = ["Snapshot"]

SLICE_BYTES = 4 << 20
"""Small enough to be in the processor's cache still when it is sent after it was summed."""
_ZEROS = bytes(ALIGNMENT)


class Snapshot:
    """One state dict, ready to be sent in any number of parts.

    Raises TypeError when a value cannot travel; the message names its place.
    """

    def __init__(self, state: object, step: int) -> None:
        tree, sources = encode(state)
        self._sources = [source.on_cpu() for source in sources]
        self._leaves = tuple(source.leaf for source in self._sources)
        self._head = encode_head(Head(step, uuid.uuid4().hex, tree, self._leaves))

    @staticmethod
    def check(state: object) -> None:
        """Raise as making one would, without copying a tensor."""
        tree, sources = encode(state)
        encode_head(Head(0, "", tree, tuple(source.leaf for source in sources)))

    def part(self, part: int, parts: int) -> Part:
        """Part `part` of `parts`, from 0."""
        return Part(self, blocks_of_part(self._leaves, part, parts))


class Part:
    """The share of a state that one connection carries."""

    def __init__(self, snapshot: Snapshot, blocks: list[Block]) -> None:
        self._snapshot = snapshot
        self._blocks = blocks
        self.nbytes = part_bytes(len(snapshot._head), blocks)

    def write(self, send: Callable[[list[memoryview | bytes]], None]) -> None:
        """Call `send` with one piece of the stream after the other."""
        send([self._snapshot._head])
        checksum = Checksum()
        for block in self._blocks:
            for piece in _pieces(self._padded_slices(block, checksum)):
                send(piece)
            checksum.end_block()
        send([TRAILER.pack(checksum.value)])

    def _padded_slices(self, block: Block, checksum: Checksum) -> Iterator[memoryview | bytes]:
        ends = itertools.chain(block.offsets[1:], [block.nbytes])
        for index, offset, end in zip(block.leaves, block.offsets, ends, strict=True):
            data = self._snapshot._sources[index].bytes()
            for begin in range(0, len(data), SLICE_BYTES):
                piece = data[begin : begin + SLICE_BYTES]
                checksum.add(piece)
                yield piece
            if padding := end - offset - len(data):
                yield _ZEROS[:padding]


def _pieces(slices: Iterator[memoryview | bytes]) -> Iterator[list[memoryview | bytes]]:
    """Gather small slices, so that thousands of scalars do not cost a system call each."""
    piece: list[memoryview | bytes] = []
    size = 0
    for one in slices:
        piece.append(one)
        size += len(one)
        if size >= SLICE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
