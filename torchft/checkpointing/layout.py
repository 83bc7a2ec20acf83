"""How a state looks on the wire: a checked header that says everything, then plain bytes.

    prefix   magic, version, CRC-32 and length of the header
    header   JSON: the step, the window's id, the tree of plain values, dtype and shape of each leaf
    payload  the bytes of the leaves, little-endian, each from a multiple of 64 bytes on
    trailer  a 64-bit checksum of the payload

A leaf is a tensor, an array or a byte string; `tree.py` says how the rest becomes JSON. Nothing
here is ever executed or unpickled. The receiver checks the header before it believes any of it,
and what it then allocates follows from dtypes and shapes alone.

A state may travel as n parts over n connections. Which leaf is in which part, and where, follows
from the leaves' sizes, so both ends compute it (`blocks_of_part`) and it is never sent.

The checksum adds 64-bit words up, block by block. It costs a tenth of what CRC-32 does: on two
cores of a small cloud machine zlib's CRC-32 runs at 4 GB/s and halved a loopback transfer, the sum
runs at 30 GB/s and was not to be seen. It finds every error within one word, and others but for
one in 2**64; what is swapped inside one block it does not see, but TCP does not swap.
"""

from __future__ import annotations

import heapq
import json
import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchft.errors import HealError

__all__ = [
    "ALIGNMENT",
    "DTYPES",
    "MAX_HEADER_BYTES",
    "PREFIX",
    "TRAILER",
    "Block",
    "Head",
    "LayoutError",
    "Leaf",
    "blocks_of",
    "blocks_of_part",
    "decode_head",
    "decode_prefix",
    "encode_head",
    "part_bytes",
]

MAGIC = b"torchft\x00"
VERSION = 1
PREFIX = struct.Struct("<8sIIQ")
"""Magic, version, CRC-32 of the header, length of the header in bytes."""
TRAILER = struct.Struct("<Q")

ALIGNMENT = 64
"""Each leaf starts at a multiple of this many bytes, as tensors do that torch allocates itself."""
BLOCK_BYTES = 16 << 20
"""Smaller leaves share one allocation of about this size, and stay alive together."""
MAX_HEADER_BYTES = 64 << 20
"""About half a million tensors."""
MAX_LEAVES = 1 << 20
MAX_DIMENSIONS = 64

_DTYPE_NAMES = (
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 "
    "complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
    "float8_e8m0fnu float4_e2m1fn_x2"
)
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in _DTYPE_NAMES.split() if hasattr(torch, name)
}
"""The dtypes that travel. Older versions of torch lack the newest. Quantised ones carry scales."""


class LayoutError(HealError):
    """What arrived is not a state in this layout."""


@dataclass(frozen=True)
class Leaf:
    """One run of payload bytes: `dtype` is a name in `DTYPES`, no dimension is negative."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes of the payload it takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Head:
    """The checked fields of a header: step, window, tree and leaves."""

    step: int
    window: str
    """A random id of the window, so that parts of two different windows are never mixed."""
    tree: Any
    """The plain values as JSON; leaves appear in it by index. Checked by `tree.decode`."""
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True)
class Block:
    """Leaves that are contiguous in the payload, and in the receiver's memory."""

    leaves: tuple[int, ...]
    offsets: tuple[int, ...]
    """Where each leaf begins in the block, in bytes."""
    nbytes: int
    """Padding included; a multiple of `ALIGNMENT`."""


def encode_head(head: Head) -> bytes:
    """Prefix and header. Raises ValueError when the header is larger than `MAX_HEADER_BYTES`."""
    leaves = [[leaf.dtype, leaf.shape] for leaf in head.leaves]
    fields = {"step": head.step, "window": head.window, "tree": head.tree, "leaves": leaves}
    body = json.dumps(fields, separators=(",", ":")).encode()
    if len(body) > MAX_HEADER_BYTES:
        raise ValueError(
            f"the plain values of this state take {len(body)} bytes as JSON, above the limit of "
            f"{MAX_HEADER_BYTES}: keep large lists of numbers as tensors"
        )
    return PREFIX.pack(MAGIC, VERSION, zlib.crc32(body), len(body)) + body


def decode_prefix(prefix: bytes) -> int:
    """Length of the header that follows, in bytes; at most `MAX_HEADER_BYTES`.

    Raises:
        LayoutError: not this layout, another version, or a length out of range.
    """
    magic, version, _, length = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise LayoutError(f"this is no torchft state: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise LayoutError(
            f"the donor sends layout version {version}, this process reads {VERSION}: "
            "run the same torchft everywhere"
        )
    if length > MAX_HEADER_BYTES:
        raise LayoutError(f"a header of {length} bytes is above the limit of {MAX_HEADER_BYTES}")
    return int(length)


def decode_head(prefix: bytes, body: bytes) -> Head:
    """Check the header and say what it holds.

    Raises:
        LayoutError: a broken checksum, or a header that does not say what it must.
    """
    if zlib.crc32(body) != PREFIX.unpack(prefix)[2]:
        raise LayoutError("the header's checksum does not match: it was damaged on its way")
    try:
        fields = json.loads(body)
        step, window, tree, leaves = (fields[k] for k in ("step", "window", "tree", "leaves"))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise LayoutError(f"the header is malformed: {_brief(error)}") from None
    if type(step) is not int or type(window) is not str or type(leaves) is not list:
        raise LayoutError("the header is malformed: a field has the wrong type")
    if len(leaves) > MAX_LEAVES:
        raise LayoutError(f"{len(leaves)} leaves are above the limit of {MAX_LEAVES}")
    return Head(step, window, tree, tuple(_checked_leaf(leaf) for leaf in leaves))


def _checked_leaf(described: object) -> Leaf:
    match described:
        case [str(dtype), list(shape)] if len(shape) <= MAX_DIMENSIONS:
            if dtype not in DTYPES:
                raise LayoutError(f"dtype {dtype[:40]!r} is unknown to torch {torch.__version__}")
            if any(type(size) is not int or not 0 <= size < 1 << 63 for size in shape):
                raise LayoutError(f"a leaf has the impossible shape {str(shape)[:80]}")
            return Leaf(dtype, tuple(shape))
    raise LayoutError(f"the header describes a leaf as {str(described)[:80]}")


def blocks_of_part(leaves: Sequence[Leaf], part: int, parts: int) -> list[Block]:
    """The blocks of one of `parts` parts, in the order in which they travel."""
    if parts == 1:
        return list(blocks_of(leaves, range(len(leaves))))
    return list(blocks_of(leaves, _balanced([leaf.nbytes for leaf in leaves], parts)[part]))


def part_bytes(head_bytes: int, blocks: Sequence[Block]) -> int:
    """Length of one part's stream, when prefix and header together take `head_bytes`."""
    return head_bytes + sum(block.nbytes for block in blocks) + TRAILER.size


def _balanced(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Largest first, each to the part with the least so far; both ends must agree on ties."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    load = [(0, part) for part in range(parts)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least, part = heapq.heappop(load)
        shares[part].append(index)
        heapq.heappush(load, (least + sizes[index], part))
    return [sorted(share) for share in shares]


def blocks_of(leaves: Sequence[Leaf], indices: Iterable[int]) -> Iterator[Block]:
    """The leaves at `indices` in blocks, in that order."""
    members: list[int] = []
    offsets: list[int] = []
    end = 0
    for index in indices:
        size = leaves[index].nbytes
        if members and end + size > BLOCK_BYTES:
            yield Block(tuple(members), tuple(offsets), end)
            members, offsets, end = [], [], 0
        members.append(index)
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    if members:
        yield Block(tuple(members), tuple(offsets), end)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
