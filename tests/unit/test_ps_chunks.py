"""Rows in chunks: sizes, damage, identity."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchft.parameter_server.core import chunks as module
from torchft.parameter_server.core.chunks import ChunkError, Chunks, identity_of
from torchft.quantization import codec_of

CODECS = ["fp32", "bf16", "int8", "int4"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 512)


def row(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, n, generator=torch.Generator().manual_seed(seed))


def wire(chunks: Chunks, numbers: torch.Tensor) -> bytes:
    return b"".join(chunks.encode(i, numbers[:, chunks.span(i)]) for i in range(chunks.count))


def read(chunks: Chunks, data: bytes, folder: Path) -> torch.Tensor:
    out = torch.empty(1, chunks.n)
    (folder / "row").write_bytes(data)
    for index, piece in enumerate(chunks.read(folder / "row")):
        chunks.decode(index, piece, out[:, chunks.span(index)])
    return out


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [0, 1, 511, 512, 513, 1024, 1300])
def test_sizes_are_known_before_the_first_byte(tmp_path: Path, codec: str, n: int) -> None:
    chunks = Chunks(n, codec_of(codec))
    data = wire(chunks, row(n))
    assert len(data) == chunks.nbytes == sum(map(chunks.nbytes_of, range(chunks.count)))
    out = read(chunks, data, tmp_path)
    bound = codec_of(codec).error_bound(row(n)) if n else torch.zeros(1, 0)
    assert bool(((out - row(n)).abs() <= bound).all())


@pytest.mark.parametrize("at", [0, 700, -1])
def test_a_flipped_bit_is_noticed(tmp_path: Path, at: int) -> None:
    chunks = Chunks(1300, codec_of("bf16"))
    data = bytearray(wire(chunks, row(1300)))
    data[at] ^= 16
    with pytest.raises(ChunkError, match="checksum"):
        read(chunks, bytes(data), tmp_path)


def test_chunks_that_changed_places_are_noticed(tmp_path: Path) -> None:
    chunks = Chunks(1024, codec_of("fp32"))
    data = wire(chunks, row(1024))
    half = len(data) // 2
    with pytest.raises(ChunkError):
        read(chunks, data[half:] + data[:half], tmp_path)


def test_a_short_row_is_noticed(tmp_path: Path) -> None:
    chunks = Chunks(600, codec_of("int8"))
    data = wire(chunks, row(600))
    with pytest.raises(ChunkError, match="bytes"):
        read(chunks, data[:-1], tmp_path)


def test_identities_follow_from_bits() -> None:
    one = row(1300)
    assert identity_of(one) == identity_of(one.clone())
    other = one.clone()
    other[0, 1299] += 1e-6
    assert identity_of(one) != identity_of(other)
    swapped = torch.cat([one[:, 512:1024], one[:, :512], one[:, 1024:]], 1)
    assert identity_of(one) != identity_of(swapped)


def test_a_disk_that_is_full_within_a_chunk_is_an_error() -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            return 3

    chunks = Chunks(5, codec_of("fp32"))
    path = SimpleNamespace(open=lambda *_, **__: Full())
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        chunks.write_one(path, 0, chunks.memory())  # type: ignore[arg-type]
