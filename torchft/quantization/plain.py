"""Numbers sent as they are, or as the upper half of their bits."""

from __future__ import annotations

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.quantization.codec import Codec, numbers_of, typed, wire_of

__all__ = ["BFloat16", "Identity"]


class _Plain(Codec):
    """One number after the other, each in `wire`."""

    wire: torch.dtype

    def encoded_bytes(self, n: int) -> int:
        """How many bytes `n` numbers take; there are no scales."""
        return self.wire.itemsize * n

    def encode(self, values: Tensor) -> Tensor:
        """A cast; rounds to nearest, ties to even."""
        cast = numbers_of(values).to(self.wire).contiguous().view(-1).view(torch.uint8)
        return cast.view(*values.shape[:-1], self.encoded_bytes(values.shape[-1]))

    def decode(
        self,
        encoded: Tensor,
        n: int,
        dtype: torch.dtype = torch.float32,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """A cast; without `out` it may share storage."""
        rows = typed(wire_of(encoded, self.encoded_bytes(n)), self.wire)
        numbers = rows.view(*encoded.shape[:-1], n)
        return numbers.to(dtype) if out is None else out.copy_(numbers)

    def decode_add_(self, total: Tensor, encoded: Tensor) -> Tensor:
        """Without a cast of the whole."""
        rows = typed(wire_of(encoded, self.encoded_bytes(total.shape[-1])), self.wire)
        return total.add_(rows.view(total.shape))


class Identity(_Plain):
    """fp32, as it is: nothing is lost. 4 bytes each."""

    name = "fp32"
    wire = torch.float32

    def check(self, dtype: torch.dtype) -> None:
        """Refuse what is no floating-point dtype, and fp64, which would lose digits.

        Raises:
            SettingsError: the dtype cannot be encoded without loss.
        """
        super().check(dtype)
        if dtype == torch.float64:
            raise SettingsError(
                "the codec fp32 loses nothing, so it takes no float64: cast it before"
            )

    def encode(self, values: Tensor) -> Tensor:
        """The same storage where it is fp32 and contiguous.

        Raises:
            ValueError: fp64.
        """
        self.check(values.dtype)
        return super().encode(values)

    def error_bound(self, values: Tensor) -> Tensor:
        """Zeros: no number changes when it is encoded."""
        return torch.zeros_like(values, dtype=torch.float32)


class BFloat16(_Plain):
    """8 significant bits, fp32's range. 2 bytes each.

    A number changes by at most 2⁻⁸ of itself (2⁻¹³³ below the normal range). From 3.3962e38 on,
    which fp32 can hold and bf16 cannot, numbers become infinite.
    """

    name = "bf16"
    wire = torch.bfloat16

    def error_bound(self, values: Tensor) -> Tensor:
        """|x|·2⁻⁸ + 2⁻¹³³ for each number; infinity where bf16 overflows."""
        sizes = values.detach().to(torch.float32).abs()
        bound = sizes * 2.0**-8 + 2.0**-133
        return bound.masked_fill_(sizes.to(self.wire).isinf(), torch.inf)
