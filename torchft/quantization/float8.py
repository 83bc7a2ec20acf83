"""Eight-bit floats with a scale for each block."""

from __future__ import annotations

import torch
from torch import Tensor

from torchft.quantization.blockwise import Blockwise

__all__ = ["Float8"]


class Float8(Blockwise):
    """e4m3: 4 significant bits, blocks of 256: 1.016 bytes each, 0.254 of fp32.

    Small numbers beside a large one keep their digits: a number changes by at most 1/16 of itself,
    or by 1/458 000 of the largest in its block.
    """

    kind = "fp8"
    limit = 448.0
    usual_block = 256
    relative = 1 / 16
    step = 1 / 458_000
    unit = 2.0**8

    def code_bytes(self, n: int) -> int:
        """One byte for each of `n` codes."""
        return n

    def pack(self, scaled: Tensor, codes: Tensor) -> None:
        """A cast; rounds to nearest, ties to even."""
        codes.view(torch.float8_e4m3fn).copy_(scaled)

    def unpack(self, codes: Tensor, numbers: Tensor) -> None:
        """Their bits, moved to where fp16 has them, are 2⁻⁸ of them; a cast takes four times as
        long."""
        spread = codes.view(torch.int8).to(torch.int16)
        spread.bitwise_left_shift_(7).bitwise_and_(-0x4080)
        numbers.copy_(spread.view(torch.float16))
