"""Whole numbers with a scale for each block: one byte each, or half a byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchft.quantization.blockwise import Blockwise

__all__ = ["Int4", "Int8"]


class Int8(Blockwise):
    """-127 to 127, blocks of 256: 1.016 bytes each, 0.254 of fp32.

    A number changes by at most 1/253 of the largest in its block.
    """

    kind = "int8"
    limit = 127.0
    usual_block = 256
    step = 1 / 253

    def code_bytes(self, n: int) -> int:
        """One byte for each of `n` codes."""
        return n

    def pack(self, scaled: Tensor, codes: Tensor) -> None:
        """The codes as bytes, in two's complement."""
        codes.view(torch.int8).copy_(scaled.round_())

    def unpack(self, codes: Tensor, numbers: Tensor) -> None:
        """The codes from their bytes, by a cast."""
        numbers.copy_(codes.view(torch.int8))


class Int4(Blockwise):
    """-7 to 7, blocks of 64: 0.563 bytes each, 0.141 of fp32.

    A number changes by at most 1/13.9 of the largest in its block. A code is stored as itself
    plus 8; the even of two neighbours has the lower half of the byte.
    """

    kind = "int4"
    limit = 7.0
    usual_block = 64
    step = 1 / 13.9

    def code_bytes(self, n: int) -> int:
        """Two in a byte; at an odd end half of it is unused."""
        return (n + 1) // 2

    def pack(self, scaled: Tensor, codes: Tensor) -> None:
        """Two bytes become one: 0x0H0L → 0xHL."""
        halves = scaled.round_().add_(8.0).to(torch.uint8)
        if halves.shape[1] % 2:
            halves = pad(halves, (0, 1), value=8)
        pairs = halves.view(torch.int16)
        codes.copy_(pairs.bitwise_or_(pairs >> 4).bitwise_and_(0xFF))

    def unpack(self, codes: Tensor, numbers: Tensor) -> None:
        """One byte becomes two: 0xHL → 0x0H0L."""
        pairs = codes.to(torch.int16, memory_format=torch.contiguous_format)
        halves = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
        numbers.copy_(halves[:, : numbers.shape[1]]).sub_(8.0)
