"""A state in a file, in the layout that it has on the wire: checked when it is read."""

from __future__ import annotations

from io import BufferedIOBase
from pathlib import Path
from typing import Any

from torch import Tensor

from torchft.checkpointing.layout import (
    PREFIX,
    TRAILER,
    Block,
    Head,
    LayoutError,
    blocks_of_part,
    decode_head,
    decode_prefix,
)
from torchft.checkpointing.memory import Checksum, fresh_memory, tensors_in
from torchft.checkpointing.snapshot import SLICE_BYTES, Snapshot
from torchft.checkpointing.tree import decode

__all__ = ["read_state", "read_state_from", "write_state"]


def write_state(file: BufferedIOBase, state: object, step: int) -> None:
    """Write `state`, without copying its tensors.

    Raises:
        TypeError: a value has no plain form; the message names its place.
    """

    def send(pieces: list[memoryview | bytes]) -> None:
        for piece in pieces:
            file.write(piece)

    Snapshot(state, step).part(0, 1).write(send)


def read_state(path: Path) -> tuple[int, Any]:
    """Step and state. Tensors are fresh memory on the CPU.

    Raises:
        LayoutError: the file is cut short, damaged, or something else.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return read_state_from(file, str(path))


def read_state_from(file: BufferedIOBase, name: str) -> tuple[int, Any]:
    """The same, of one state that begins where `file` is and may be followed by others."""
    prefix = _read(file, PREFIX.size)
    head = decode_head(prefix, _read(file, decode_prefix(prefix)))
    leaves: dict[int, Tensor] = {}
    checksum = Checksum()
    for block in blocks_of_part(head.leaves, 0, 1):
        leaves.update(_read_block(file, block, head, checksum))
    if TRAILER.unpack(_read(file, TRAILER.size))[0] != checksum.value:
        raise LayoutError(f"the checksum of {name} does not match: it was damaged")
    return head.step, decode(head.tree, [leaves[index] for index in range(len(head.leaves))])


def _read_block(
    file: BufferedIOBase, block: Block, head: Head, checksum: Checksum
) -> dict[int, Tensor]:
    memory = fresh_memory(block.nbytes)
    for begin in range(0, block.nbytes, SLICE_BYTES):
        piece = memory[begin : begin + SLICE_BYTES]
        if file.readinto(piece) != len(piece):
            raise LayoutError("the file is cut short")
        checksum.add(piece)
    checksum.end_block()
    return dict(tensors_in(memory, block, head.leaves))


def _read(file: BufferedIOBase, nbytes: int) -> bytes:
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise LayoutError("the file is cut short")
    return data
