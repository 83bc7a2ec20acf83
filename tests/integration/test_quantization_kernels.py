"""The Triton kernels give the bytes and numbers of the torch operations.

On a GPU as they are; elsewhere Triton's interpreter runs them, in a process of its own since that
is chosen at import. Its casts to bf16 are not rounded as a GPU's, so that is left out there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from torchft.quantization import Codec, Float8, Int4, Int8
from torchft.quantization.blockwise import Blockwise

CODECS: list[Blockwise] = [Int8(), Int4(), Float8(), Int8(64), Int4(16), Float8(4096)]
SHAPES = ((1, 1), (2, 7), (3, 257), (2, 4999))

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def _rows(count: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of many magnitudes; in long rows blocks that need care."""
    generator = torch.Generator().manual_seed(100 * count + n)
    exponents = torch.randint(-30, 14, (count, n), generator=generator)
    rows = torch.randn(count, n, generator=generator) * 2.0**exponents
    rows[0, 0] = -0.0
    if n > 4096:
        rows[0, 3], rows[1, 270] = float("nan"), float("-inf")
        rows[0, 512:1024], rows[1, 700] = -1e-40, 3e38
        rows[1, 1024:2048] = 0.0
    return rows.to(dtype)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def compare(codec: Blockwise, rows: torch.Tensor) -> None:
    """Kernels on the device of `rows`, the torch operations on the CPU."""
    from torchft.quantization import triton_kernels

    count, n = rows.shape
    encoded = codec.encode(rows.cpu()).to(rows.device)
    blocks = -(-n // codec.block)
    scales = torch.empty(count, blocks, device=rows.device)
    codes = torch.empty_like(encoded[:, 4 * blocks :])
    triton_kernels.encode(codec.kind, codec.block, rows, scales, codes)
    assert torch.equal(codes, encoded[:, 4 * blocks :]), (codec, rows.shape, rows.dtype)
    assert torch.equal(_bits(scales), _bits(encoded[:, : 4 * blocks])), (codec, rows.shape)

    for add in (False, True):
        found = torch.linspace(-1, 1, count * n, device=rows.device).view(count, n).to(rows.dtype)
        expected = found.cpu()
        if add:
            codec.decode_add_(expected, encoded.cpu())
        else:
            codec.decode(encoded.cpu(), n, out=expected)
        triton_kernels.decode(codec.kind, codec.block, scales, codes, found, add=add)
        assert _equal(found.cpu(), expected), (codec, rows.shape, rows.dtype, add)


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit; a NaN is a NaN."""
    same_nans = torch.equal(found.isnan(), expected.isnan())
    return same_nans and torch.equal(_bits(found.nan_to_num(7.0)), _bits(expected.nan_to_num(7.0)))


@needs_triton
def test_kernels_give_the_same_bytes_in_the_interpreter() -> None:
    script = f"import {Path(__file__).stem} as kernels; kernels.compare_all()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


def compare_all() -> None:
    """What the interpreter's process does."""
    for codec in CODECS:
        for shape in SHAPES:
            compare(codec, _rows(*shape, torch.float32))
        for dtype in (torch.float16, torch.float64):
            compare(codec, _rows(3, 257, dtype))
    print("equal")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


@pytest.mark.gpu
@needs_gpu
@needs_triton
@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kernels_give_the_same_bytes_on_a_gpu(codec: Blockwise, dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (3, 100_003)):
        compare(codec, _rows(*shape, dtype).cuda())


@pytest.mark.gpu
@needs_gpu
@every_codec
def test_a_gpu_encodes_as_a_cpu_does_with_and_without_triton(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchft.quantization import kernels

    rows = _rows(2, 4999, torch.float32)
    encoded = codec.encode(rows)
    decoded = codec.decode(encoded, 4999)
    for serves in (kernels.serve, lambda _: False):
        monkeypatch.setattr(kernels, "serve", serves)
        assert torch.equal(codec.encode(rows.cuda()).cpu(), encoded)
        assert _equal(codec.decode(encoded.cuda(), 4999).cpu(), decoded)
        total, expected = torch.ones(2, 4999), torch.ones(2, 4999)
        codec.decode_add_(expected, encoded)
        assert _equal(codec.decode_add_(total.cuda(), encoded.cuda()).cpu(), expected)
