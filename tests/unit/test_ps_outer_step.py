"""The outer step of one fragment, taken by several threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchft.parameter_server.core import chunks as module
from torchft.parameter_server.core import outer_step
from torchft.parameter_server.core.chunks import ChunkError, Chunks, identity_of
from torchft.parameter_server.core.outer_step import OuterStep
from torchft.quantization import codec_of

N = 700
"""Numbers, in eleven chunks of 64."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)


def row(seed: int) -> Tensor:
    return torch.randn(1, N, generator=torch.Generator().manual_seed(seed))


def upload(path: Path, chunks: Chunks, numbers: Tensor) -> Path:
    path.write_bytes(b"".join(chunks.encode(at, numbers[:, span]) for at, span in chunks.spans()))
    return path


def step_of(folder: Path, codec: str) -> OuterStep:
    folder.mkdir(exist_ok=True)
    chunks, weights = Chunks(N, codec_of(codec)), row(0)
    uploads = [(upload(folder / f"{k}", chunks, row(k)), 0.5**k) for k in (1, 2)]
    sent = weights if codec == "fp32" else weights.clone()

    def step(index: int, mean: Tensor) -> None:
        weights[:, chunks.span(index)].sub_(mean, alpha=0.7)

    return OuterStep(chunks, uploads, step, weights, sent, folder / "news")


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4"])
def test_bits_are_those_of_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    found = []
    for threads in (1, 3, 64):
        monkeypatch.setattr(outer_step, "_THREADS", threads)
        one = step_of(tmp_path / str(threads), codec)
        norm, identity = one.take()
        assert identity == identity_of(one.sent)
        assert norm == pytest.approx(float(torch.linalg.vector_norm(one.weights)))
        found.append((norm, identity, one.path.read_bytes()))
    assert found[1:] == found[:1] * 2


def test_an_upload_that_is_damaged_by_now_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outer_step, "_THREADS", 2)
    one = step_of(tmp_path, "int8")
    path = one.uploads[1][0]
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChunkError, match="chunk 10"):
        one.take()
