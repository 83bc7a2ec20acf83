"""Uploads on their way in: what two connections do to one of them."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
import torch

from torchft.parameter_server.core import chunks as module
from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.refused import NotFound
from torchft.parameter_server.server.upload import Upload
from torchft.quantization import Identity

N = 30


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Chunks:
    monkeypatch.setattr(module, "CHUNK", 10)
    return Chunks(N, Identity())


def encoded(chunks: Chunks) -> list[memoryview]:
    row = torch.arange(float(N))[None]
    return [memoryview(bytearray(chunks.encode(i, row[:, span]))) for i, span in chunks.spans()]


# An error of ours that must not come back: it counted twice, and the next one was never written.
def test_a_chunk_that_two_connections_bring_at_once_counts_once(
    tmp_path: Path, chunks: Chunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake, data = Upload(tmp_path / "row", chunks, 1e9), encoded(chunks)
    both = threading.Barrier(2)
    norm = Chunks.norm

    def meet(self: Chunks, index: int, piece: memoryview) -> float:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # breaks where chunks are taken one at a time
        return norm(self, index, piece)

    monkeypatch.setattr(Chunks, "norm", meet)
    threads = [threading.Thread(target=intake.take, args=(0, data[0])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert intake.have == 1
    for index in (1, 2):
        intake.take(index, data[index])
    assert intake.is_complete
    assert [bytes(piece) for piece in chunks.read(intake.path)] == [bytes(one) for one in data]


def test_a_chunk_of_an_upload_that_was_given_up_is_refused(tmp_path: Path, chunks: Chunks) -> None:
    intake, data = Upload(tmp_path / "row", chunks, 1e9), encoded(chunks)
    intake.take(0, data[0])
    intake.drop()
    with pytest.raises(NotFound, match="offer the submission again"):
        intake.take(1, data[1])
    assert not intake.path.exists()
