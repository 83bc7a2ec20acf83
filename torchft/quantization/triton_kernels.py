"""The codecs of `blockwise` on a GPU, in one pass over memory each; the same bytes.

A program has a few blocks of one row. Every arithmetic step is rounded by itself, as in torch:
nothing is fused (`enable_fp_fusion=False`), and divisions are correctly rounded.
"""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from torchft.quantization.scale import LEAST_SCALE, largest_scale

__all__ = ["decode", "encode"]

_NUMBERS = 4096
"""Of one program: as many blocks as fit."""
_KINDS = {"int8": (0, 127.0), "int4": (1, 7.0), "fp8": (2, 448.0)}

_INT8 = tl.constexpr(0)
_INT4 = tl.constexpr(1)
_ROUND = tl.constexpr(12582912.0)  # 1.5·2²³: above it fp32 knows whole numbers only
_INFINITE = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_LEAST = tl.constexpr(LEAST_SCALE)
_REBIAS = tl.constexpr(120)  # fp32's exponents begin at -127, e4m3's at -7
_FP8_NORMAL = tl.constexpr(2.0**-6)
_FP8_LEAST = tl.constexpr(2.0**-9)
_FP8_ROUND = tl.constexpr(2.0**14)  # above it fp32 knows multiples of 2⁻⁹ only


def encode(kind: str, block: int, rows: Tensor, scales: Tensor, codes: Tensor) -> None:
    """Write the scales `[rows, blocks]` and codes of `rows` `[rows, n]`."""
    code, limit = _KINDS[kind]
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    grid, together = _grid(rows, block)
    _encode[grid](
        *(rows, scales, codes, *rows.shape, rows.stride(0), scales.stride(0), codes.stride(0)),
        LIMIT=limit,
        LARGEST_SCALE=largest_scale(limit),
        KIND=code,
        BLOCK=block,
        TOGETHER=together,
        enable_fp_fusion=False,
    )


def decode(
    kind: str, block: int, scales: Tensor, codes: Tensor, rows: Tensor, *, add: bool
) -> None:
    """Write codes times scales into `rows`, or add them to it."""
    grid, together = _grid(rows, block)
    _decode[grid](
        *(scales, codes, rows, *rows.shape, scales.stride(0), *codes.stride(), *rows.stride()),
        ADD=add,
        KIND=_KINDS[kind][0],
        BLOCK=block,
        TOGETHER=together,
        enable_fp_fusion=False,
    )


def _grid(rows: Tensor, block: int) -> tuple[tuple[int], int]:
    """How many programs, and how many blocks each of them has."""
    together = _NUMBERS // block
    return (rows.shape[0] * triton.cdiv(rows.shape[1], together * block),), together


@triton.jit
def _place(n: Any, BLOCK: tl.constexpr, TOGETHER: tl.constexpr) -> Any:
    """Which row, and which of its blocks, this program has."""
    programs = tl.cdiv(n, BLOCK * TOGETHER)
    program = tl.program_id(0)
    row = (program // programs).to(tl.int64)
    return row, (program % programs).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)


@triton.jit
def _encode(
    source: Any,
    scales: Any,
    codes: Any,
    count: Any,
    n: Any,
    source_stride: Any,
    scales_stride: Any,
    codes_stride: Any,
    LIMIT: tl.constexpr,
    LARGEST_SCALE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    row, blocks = _place(n, BLOCK, TOGETHER)
    at = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    numbers = tl.load(source + row * source_stride + at, mask=at < n, other=0.0).to(tl.float32)

    # As integers NaN is the largest, then infinity.
    sizes = numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    peak = tl.max(sizes, axis=1)
    finite = peak < _INFINITE
    divisor = tl.full(peak.shape, LIMIT, tl.float32)
    scale = tl.div_rn(peak.to(tl.float32, bitcast=True), divisor)
    scale = tl.minimum(scale, LARGEST_SCALE)
    scale = tl.where(scale < _LEAST, 0.0, scale)
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale)))
    nan = tl.full(scale.shape, _NAN, tl.int32).to(tl.float32, bitcast=True)
    whole = blocks * BLOCK < n
    tl.store(scales + row * scales_stride + blocks, tl.where(finite, scale, nan), mask=whole)

    scaled = tl.where(finite[:, None], numbers * inverse[:, None], 0.0)
    target = codes + row * codes_stride
    if KIND == _INT4:
        halves = (((scaled + _ROUND) - _ROUND) + 8.0).to(tl.int32)
        low, high = tl.split(tl.reshape(halves, (TOGETHER, BLOCK // 2, 2)))
        pair = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        tl.store(target + pair, (low | (high << 4)).to(tl.uint8), mask=pair < (n + 1) // 2)
    elif KIND == _INT8:
        whole_numbers = ((scaled + _ROUND) - _ROUND).to(tl.int32)
        tl.store(target + at, (whole_numbers & 0xFF).to(tl.uint8), mask=at < n)
    else:
        tl.store(target + at, _to_fp8(scaled), mask=at < n)


@triton.jit
def _to_fp8(numbers: Any) -> Any:
    """e4m3, to nearest even; any GPU can, not only those with a cast for it."""
    bits = numbers.to(tl.int32, bitcast=True)
    size_bits = bits & 0x7FFFFFFF
    size = size_bits.to(tl.float32, bitcast=True)
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - (_REBIAS << 3)
    # The lowest bits of the sum count multiples of 2⁻⁹.
    small = (size + _FP8_ROUND).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < _FP8_NORMAL, small, normal) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8)


@triton.jit
def _from_fp8(codes: Any) -> Any:
    size = codes & 0x7F
    normal = ((size << 20) + (_REBIAS << 23)).to(tl.float32, bitcast=True)
    number = tl.where(size < 8, size.to(tl.float32) * _FP8_LEAST, normal)
    sign = (codes & 0x80) << 24
    return (number.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _decode(
    scales: Any,
    codes: Any,
    target: Any,
    count: Any,
    n: Any,
    scales_stride: Any,
    codes_stride: Any,
    code_stride: Any,
    target_stride: Any,
    number_stride: Any,
    ADD: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
) -> None:
    row, blocks = _place(n, BLOCK, TOGETHER)
    at = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    source = codes + row * codes_stride
    if KIND == _INT4:
        pair = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        both = tl.load(source + pair * code_stride, mask=pair < (n + 1) // 2, other=0).to(tl.int32)
        halves = tl.reshape(tl.join(both & 0xF, both >> 4), (TOGETHER, BLOCK))
        numbers = halves.to(tl.float32) - 8.0
    else:
        code = tl.load(source + at * code_stride, mask=at < n, other=0)
        if KIND == _INT8:
            numbers = code.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            numbers = _from_fp8(code.to(tl.int32))
    scale = tl.load(scales + row * scales_stride + blocks, mask=blocks * BLOCK < n, other=0.0)
    numbers = numbers * scale[:, None]

    places = target + row * target_stride + at * number_stride
    kind = target.dtype.element_ty
    if ADD:
        before = tl.load(places, mask=at < n, other=0.0)
        if kind == tl.float64:
            numbers = before + numbers.to(tl.float64)
        else:
            numbers = before.to(tl.float32) + numbers
    tl.store(places, numbers.to(kind), mask=at < n)
