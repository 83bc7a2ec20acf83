"""The header is checked before any of it is believed."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchft.checkpointing.layout import (
    ALIGNMENT,
    BLOCK_BYTES,
    MAX_HEADER_BYTES,
    PREFIX,
    Head,
    LayoutError,
    Leaf,
    blocks_of_part,
    decode_head,
    decode_prefix,
    encode_head,
)
from torchft.checkpointing.memory import Checksum, fresh_memory
from torchft.errors import HealError

HEAD = Head(7, "window", ["dict", ["w", ["tensor", 0]]], (Leaf("float32", (2, 3)),))


def read(raw: bytes) -> Head:
    prefix = raw[: PREFIX.size]
    length = decode_prefix(prefix)
    return decode_head(prefix, raw[PREFIX.size : PREFIX.size + length])


def sealed(body: object) -> bytes:
    """A header with a right checksum, whatever it says."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return PREFIX.pack(b"torchft\x00", 1, zlib.crc32(text), len(text)) + text


def with_leaf(leaf: Any) -> bytes:
    return sealed({"step": 7, "window": "w", "tree": None, "leaves": [leaf]})


def test_a_header_reads_back_as_it_was_written() -> None:
    assert read(encode_head(HEAD)) == HEAD


def test_a_wrong_magic_says_what_it_begins_with() -> None:
    with pytest.raises(HealError, match=r"no torchft state.*HTTP/1\.1"):
        decode_prefix(b"HTTP/1.1 200 OK\r\nServer: x"[: PREFIX.size])


def test_another_version_says_what_to_do() -> None:
    with pytest.raises(LayoutError, match=r"layout version 9.*same torchft"):
        decode_prefix(PREFIX.pack(b"torchft\x00", 9, 0, 10))


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_gigantic_header_length_is_refused_unread(length: int) -> None:
    with pytest.raises(LayoutError, match="above the limit"):
        decode_prefix(PREFIX.pack(b"torchft\x00", 1, 0, length))


def test_a_negative_header_length_is_refused_unread() -> None:
    with pytest.raises(LayoutError, match="above the limit"):
        decode_prefix(struct.pack("<8sIIq", b"torchft\x00", 1, 0, -1))


@pytest.mark.parametrize("position", range(PREFIX.size, PREFIX.size + 20))
def test_a_flipped_header_byte_is_noticed(position: int) -> None:
    raw = bytearray(encode_head(HEAD))
    raw[position] ^= 1
    with pytest.raises(LayoutError, match="checksum"):
        read(bytes(raw))


@pytest.mark.parametrize(
    "leaf",
    [
        ["float32", [-1]],
        ["float32", [2**63]],
        ["float32", [1.5]],
        ["float32", [True]],
        ["float32", ["2"]],
        ["float32", [1] * 65],
        ["float32", 3],
        ["float33", [3]],
        ["qint8", [3]],
        ["__class__", [3]],
        ["float32"],
        {"dtype": "float32"},
        None,
    ],
    ids=str,
)
def test_an_impossible_leaf_is_refused(leaf: Any) -> None:
    with pytest.raises(LayoutError):
        read(with_leaf(leaf))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe",
        b"not json",
        b"[" * 100_000,
        b"null",
        b"[]",
        b"{}",
        b'{"step":"7","window":"w","tree":null,"leaves":[]}',
        b'{"step":7,"window":1,"tree":null,"leaves":[]}',
        b'{"step":7,"window":"w","tree":null,"leaves":{}}',
        b'{"step":' + b"9" * 5000 + b',"window":"w","tree":null,"leaves":[]}',
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_header_that_says_nothing_sensible_is_refused(body: bytes) -> None:
    with pytest.raises(LayoutError):
        read(sealed(body))


@given(st.binary(max_size=200))
def test_any_header_is_read_or_is_a_layout_error(body: bytes) -> None:
    with contextlib.suppress(LayoutError):
        read(sealed(body))


def test_a_state_whose_header_is_too_large_is_refused_by_the_sender() -> None:
    with pytest.raises(ValueError, match="as tensors"):
        encode_head(Head(0, "w", "x" * (MAX_HEADER_BYTES + 1), ()))


def test_memory_that_nobody_has_is_a_layout_error() -> None:
    for nbytes in (1 << 60, 1 << 70):
        with pytest.raises(LayoutError, match="asks for a block"):
            fresh_memory(nbytes)


leaf_sizes = st.lists(st.integers(0, 3 * BLOCK_BYTES), max_size=30)


@given(sizes=leaf_sizes, parts=st.integers(1, 9))
def test_every_leaf_is_in_one_part_once_aligned_and_apart(sizes: list[int], parts: int) -> None:
    leaves = [Leaf("uint8", (size,)) for size in sizes]
    seen: list[int] = []
    for part in range(parts):
        for block in blocks_of_part(leaves, part, parts):
            seen += block.leaves
            ends = [*block.offsets[1:], block.nbytes]
            for index, begin, end in zip(block.leaves, block.offsets, ends, strict=True):
                assert begin % ALIGNMENT == 0
                assert 0 <= end - begin - sizes[index] < ALIGNMENT
            assert block.nbytes <= BLOCK_BYTES + ALIGNMENT or len(block.leaves) == 1
    assert sorted(seen) == list(range(len(sizes)))


def test_parts_are_balanced_by_bytes() -> None:
    leaves = [Leaf("uint8", (size,)) for size in (100, 1, 1, 50, 49, 1)]
    loads = [
        sum(leaves[i].nbytes for block in blocks_of_part(leaves, part, 2) for i in block.leaves)
        for part in (0, 1)
    ]
    assert sorted(loads) == [101, 101]


def checksum(*blocks: bytes) -> int:
    total = Checksum()
    for block in blocks:
        total.add(memoryview(block))
        total.end_block()
    return total.value


@given(data=st.binary(min_size=1, max_size=100), position=st.integers(0, 99), bit=st.integers(0, 7))
def test_every_flipped_bit_changes_the_checksum(data: bytes, position: int, bit: int) -> None:
    damaged = bytearray(data)
    damaged[position % len(data)] ^= 1 << bit
    assert checksum(data) != checksum(bytes(damaged))


def test_blocks_that_change_places_change_the_checksum() -> None:
    assert checksum(b"one", b"two") != checksum(b"two", b"one")


def test_the_checksum_of_leaves_is_that_of_their_padded_block() -> None:
    apart = Checksum()
    for leaf in (b"12345", b"abcdefgh9"):
        apart.add(memoryview(leaf))
    apart.end_block()
    together = b"12345".ljust(64, b"\0") + b"abcdefgh9".ljust(64, b"\0")
    assert apart.value == checksum(together)
